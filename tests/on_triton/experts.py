"""Inputs of `quintet.triton.gated`: experts and MLPs, in all ways to hold a weight."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from on_triton.cases import Case
from quintet.kernels.matrix import Matrix
from quintet.ops.moe import each_hit_expert
from quintet.quantization.formats import (
    FP8Format,
    GroupFormat,
    Int4Format,
    Int8Format,
    WeightFormat,
)
from quintet.quantization.mixed import FP8_ROWS
from quintet.triton.gated import gated, silu_experts

__all__ = ["CASES", "FORMATS", "experts", "matrix_of", "mlp_by_steps", "rounding", "widened"]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FORMATS: Mapping[str, WeightFormat | None] = {
    "plain": None,
    "int8": Int8Format(),
    "int4": Int4Format(),
    "int4 by 32 with offsets": GroupFormat(4, 32, offset=True),
    "int4 by 128": GroupFormat(4, 128, dtype=BF16),
    "iq4": GroupFormat(4, 32, iq4=True),
    "int8 by 16 with offsets": GroupFormat(8, 16, offset=True, dtype=F32),
    "int8 by a row with offsets": GroupFormat(8, None, offset=True),
    "fp8": FP8Format(),
    "fp8 by rows": FP8Format(FP8_ROWS),
}


def rounding(dtype: torch.dtype) -> float:
    """Return what two orders of a few roundings may differ by, of the largest magnitude."""
    return {F32: 1e-5, F16: 2**-9, BF16: 2**-6}[dtype]


def matrix_of(
    weight: Tensor, held: WeightFormat | None, device: torch.device, bias: Tensor | None = None
) -> Matrix:
    """Return a weight, or a stack of them, in a format."""
    if held is None:
        return Matrix(weight.to(device), None, bias)
    some = [weight] if weight.ndim == 2 else list(weight)
    each = [held.encode(one.to(F32)) for one in some]
    parts = {s: torch.stack([one[s] for one in each]).to(device) for s in each[0]}
    if weight.ndim == 2:
        parts = {s: part[0] for s, part in parts.items()}
    made = held.matrix(parts, bias)
    assert made is not None
    return made


def widened(matrix: Matrix, held: WeightFormat | None, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers of a weight, or of a stack of them."""
    if held is None:
        return matrix.weight
    there = (x for x in (matrix.weight, matrix.scale, matrix.offset) if x is not None)
    parts = dict(zip(held.parts((1, columns)), there, strict=True))
    if matrix.weight.ndim == 2:
        return held.decode(parts, (len(matrix.weight), columns), dtype)
    shape = (matrix.weight.shape[1], columns)
    return torch.stack(
        [
            held.decode({s: part[e] for s, part in parts.items()}, shape, dtype)
            for e in range(len(matrix.weight))
        ]
    )


def experts(
    device: torch.device,
    *,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype = BF16,
    held: WeightFormat | None = None,
    skewed: bool = False,
) -> Mapping[str, Any]:
    """Return arguments of experts (N, A, E, C, F); `skewed` has most choices fall on one."""
    N, A, E, C, width = sizes
    g = torch.Generator().manual_seed(sum(sizes))
    made = torch.randn(E, 2 * width, C, generator=g) / C**0.5
    both = made.to(dtype)
    down = (torch.randn(E, C, width, generator=g) / width**0.5).to(dtype)
    scores = torch.rand(N, E, generator=g)
    if skewed:
        scores[:, -1] += 1
    x = torch.randn(N, 2 * C, generator=g).to(device, dtype)[:, :C]
    gate, up = both.chunk(2, dim=1)
    return {
        "x": x,
        "gate": matrix_of(gate, held, device),
        "up": matrix_of(up, held, device),
        "down": matrix_of(down, held, device),
        "indices": scores.topk(A, dim=1).indices.to(device),
        "shares": torch.rand(N, A, generator=g).to(device, dtype),
    }


def mlp_by_steps(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    indices: Tensor | None = None,
    shares: Tensor | None = None,
    *,
    held: WeightFormat | None = None,
    sizes: bool = False,
) -> Tensor:
    """Compute what `gated` does, of widened weights; or the root of the sum of the squares there.

    That is how large results are that do not cancel, and what their rounding is a part of.
    """
    C = x.shape[-1]
    first, second = (widened(one, held, C, x.dtype) for one in (gate, up))
    last = widened(down, held, first.shape[-2], x.dtype)

    def run(rows: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        if sizes:
            rows, a, b, c = (each.float().square() for each in (rows, a, b, c))
            return F.linear(F.linear(rows, a) * F.linear(rows, b), c).sqrt().to(x.dtype)
        return F.linear(F.silu(F.linear(rows, a)) * F.linear(rows, b), c)

    if indices is None or shares is None:
        return run(x, first, second, last)
    return each_hit_expert(
        x, indices, shares, len(first), lambda e, rows: run(rows, first[e], second[e], last[e])
    )


def mlp(
    device: torch.device, *, shape: tuple[int, ...], dtype: torch.dtype, held: WeightFormat | None
) -> Mapping[str, Any]:
    sizes = (2, 1, 1, shape[-1], 40)
    given = dict(experts(device, sizes=sizes, dtype=dtype, held=held))
    for name in ("gate", "up", "down"):
        one = given[name]
        given[name] = Matrix(*(x[0] if isinstance(x, Tensor) else x for x in one[:4]), *one[4:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to(device, dtype)
    return {**given, "x": x, "indices": None, "shares": None}


def stacked(device: torch.device, **how: Any) -> Mapping[str, Any]:
    given = experts(device, **how)
    gate_up = torch.cat((given["gate"].weight, given["up"].weight), dim=1)
    rest = {"gate_up": gate_up, "down": given["down"].weight, "weights": given["shares"]}
    return {"x": given["x"], "indices": given["indices"], **rest}


def stacked_by_steps(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    gate, up = (Matrix(half) for half in gate_up.chunk(2, dim=1))
    return mlp_by_steps(x, gate, up, Matrix(down), indices, weights)


def case(
    name: str,
    make: Callable[..., Mapping[str, Any]],
    dtype: torch.dtype = BF16,
    held: WeightFormat | None = None,
    **how: Any,
) -> Case:
    inputs = partial(make, dtype=dtype, held=held, **how)
    return Case(name, gated, partial(mlp_by_steps, held=held), inputs, rounding(dtype))


# Compiling takes longer than computing: what else there is, properties go through.
COMPILED = ("plain", "int4 by 32 with offsets", "fp8")
BY_ID, SORTED = (1, 2, 4, 144, 24), (9, 2, 3, 144, 72)
CASES: Sequence[Case] = [
    *(case(f"experts by id, {n}", experts, held=FORMATS[n], sizes=BY_ID) for n in COMPILED),
    *(case(f"experts sorted, {n}", experts, held=FORMATS[n], sizes=SORTED) for n in COMPILED),
    case("most tokens of one expert", experts, sizes=(300, 1, 2, 40, 16), skewed=True),
    case("an MLP of two vectors", mlp, held=Int8Format(), shape=(2, 80)),
    Case(
        "experts of plain stacks",
        silu_experts,
        stacked_by_steps,
        partial(stacked, sizes=(5, 3, 4, 64, 32), dtype=F32),
        rounding(F32),
    ),
]
