"""Linear maps of few vectors, bound by reading the weights.

A weight is plain (bfloat16, float32), or of integers as in `quintet.ops.quantized`. For those,
vectors are rounded to 16 bits in groups of 64, far finer than the bfloat16 they come in, so that
the result is that of the numbers the weight stands for.
"""

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from quintet.kernels.calls import begin
from quintet.kernels.matrix import (
    Kind,
    Matrix,
    common_kind,
    integers,
    kind_of,
    write,
)


def batch_invariant() -> bool:
    """Return whether results must not depend on batch mates, even at a cost.

    That is so with `QUINTET_BATCH_INVARIANT=1`: prompts are summed in the order of steps, so that
    they may share a forward, and experts of prompts in int8 and int4 are widened.
    """
    return os.environ.get("QUINTET_BATCH_INVARIANT") == "1"


SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
# A sequence with more tokens is a prompt: kernels for prompts read its weights, whoever shares the
# batch, which is why the border is the same for whatever rounds differently there (ADR 21).
STEP_TOKENS = 16
# Beyond so many vectors, other products are the faster ones (docs/lab-notes.md).
MOST_VECTORS: Mapping[str, int] = MappingProxyType(
    {"bf16": STEP_TOKENS, "f32": 32}
    | {f"{kind}{dtype}": 16 for kind in Kind if kind for dtype in SUFFIX.values()}
)


# A map to so many numbers is a head, which meets a vector of each sequence, prompt or not.
HEAD = 16384
MOST_OF_HEAD = 64


def linears(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor] | None:
    """Return x·Wᵀ + b for each of `maps`, plain or all of integers; None where it does not apply.

    Shapes: x (..., I), returns (..., O) for each.
    """
    call = begin()
    if call is None or not x.ndim:
        return None
    dtype, kind = x.dtype, common_kind(maps)
    name = kernel_name(kind, dtype)
    shape = x.shape
    I = shape[-1]
    M = x.numel() // I if I else 0
    if name not in MOST_VECTORS or any(matrix.weight.ndim != 2 for matrix in maps):
        return None
    heads = all(len(matrix.weight) >= HEAD for matrix in maps)
    ordered = name == "bf16" and batch_invariant()
    if not 0 < M <= (MOST_OF_HEAD if heads or ordered else MOST_VECTORS[name]):
        return None
    call.integers(M, I, len(maps))
    call.copied(x, dtype, *shape)
    made = []
    for matrix in maps:
        O = len(matrix.weight)
        write(call, matrix, kind, dtype, O, I)
        made.append(call.output(x, *shape[:-1], O))
    return made if call.run(f"linear_{name}") else None


def widen(matrix: Matrix, columns: int, dtype: torch.dtype) -> Tensor | None:
    """Decode an integer weight (..., O, columns), rounded once; or None."""
    call = begin()
    weight, scale, _, offset = matrix[:4]
    kind, suffix = kind_of(matrix), SUFFIX.get(dtype)
    if call is None or suffix is None or weight.ndim < 2 or not weight.numel():
        return None
    held = integers(matrix, kind, columns)
    if held is None or scale is None:
        return None
    rows = weight.shape[:-1]
    call.integers(rows.numel(), columns)
    if kind is Kind.GROUPS:
        call.integers(held.told)
    call.packed(weight, held.numbers, *rows, held.columns)
    call.packed(scale, held.real, *rows, *held.groups)
    if kind is Kind.GROUPS:
        call.packed(offset, held.real, *rows, *held.groups)
    made = call.output(weight, *rows, columns, dtype=dtype)
    return made if call.run(f"widen_{kind}{suffix}") else None


def kernel_name(kind: Kind, dtype: torch.dtype) -> str:
    """Return the name of the kernels for `kind` and `dtype`, or None."""
    return kind + SUFFIX.get(dtype, "?")
