"""Linear maps of few vectors, bound by how fast their weights are read.

A weight is plain (bfloat16, float32), or in the int8 or int4 of `quintet.ops.quantized`. For those,
vectors are rounded to 16 bits in groups of 64, far finer than the bfloat16 they come in, so that
the result is that of the numbers the weight stands for.
"""

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.kernels.calls import Call, begin

__all__ = [
    "GROUP",
    "STEP_TOKENS",
    "Matrix",
    "batch_invariant",
    "kernel_name",
    "linears",
    "widen",
    "write",
]

GROUP = 64


class Matrix(NamedTuple):
    """A weight (O, I) and a bias (O).

    Attributes:
        weight: plain (O, I); int8 (O, I); or uint8 (O, ceil(I / 64) · 32), 4 bits each.
        scale: of int8, float32 (O,); of int4, bfloat16 (O, ceil(I / 64)); of other groups
            (O, G), see `quintet.ops.groups`; None of plain ones.
        bias: (O,) in the dtype of the vectors.
        offset: what is added to the numbers of a group, as the scale.
        iq4: whether numbers of 4 bits are places in a table.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    offset: Tensor | None = None
    iq4: bool = False

    def rows(self, rows: slice | tuple[slice, slice]) -> "Matrix":
        """Return some of its rows, of a stack (E, O, I) some experts and some rows of each."""
        weight, scale, bias, offset = (x if x is None else x[rows] for x in self[:4])
        assert weight is not None
        return Matrix(weight, scale, bias, offset, self.iq4)


def batch_invariant() -> bool:
    """Tell whether results must not depend on who shares a batch where that costs speed.

    That is so with `QUINTET_BATCH_INVARIANT=1`: prompts are summed in the order of steps, so that
    they may share a forward, and experts of prompts in int8 and int4 are widened.
    """
    return os.environ.get("QUINTET_BATCH_INVARIANT") == "1"


SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
FORMAT = {torch.int8: "int8_", torch.uint8: "int4_"}
# A sequence with more tokens is a prompt: kernels for prompts read its weights, whoever shares the
# batch, which is why the border is the same for whatever rounds differently there (ADR 21).
STEP_TOKENS = 16
# Beyond so many vectors, other products are the faster ones (docs/lab-notes.md).
MOST_VECTORS: Mapping[str, int] = MappingProxyType(
    {"bf16": STEP_TOKENS, "f32": 32}
    | dict.fromkeys(("int8_bf16", "int8_f32", "int4_bf16", "int4_f32"), 16)
)


# A map to so many numbers is a head, which meets a vector of each sequence, prompt or not.
HEAD = 16384
MOST_OF_HEAD = 64


def linears(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor] | None:
    """Return x·Wᵀ + b for each of `maps`, all of one kind; None where the kernel does not apply.

    Shapes: x (..., I), returns (..., O) for each.
    """
    call = begin()
    if call is None or not x.ndim:
        return None
    dtype, kind = x.dtype, maps[0].weight.dtype
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
    """Return an int8 or int4 weight (..., O, columns) as numbers, rounded once; or None."""
    call = begin()
    weight, scale, _, offset, iq4 = matrix
    kind, suffix = FORMAT.get(weight.dtype), SUFFIX.get(dtype)
    if call is None or kind is None or suffix is None or weight.ndim < 2 or not weight.numel():
        return None
    if offset is not None or iq4:
        return None
    rows = weight.shape[:-1]
    call.integers(rows.numel(), columns)
    if weight.dtype == torch.int8:
        call.packed(weight, torch.int8, *rows, columns)
        call.packed(scale, torch.float32, *rows)
    else:
        groups = -(-columns // GROUP)
        call.packed(weight, torch.uint8, *rows, groups * GROUP // 2)
        call.packed(scale, torch.bfloat16, *rows, groups)
    made = call.output(weight, *rows, columns, dtype=dtype)
    return made if call.run(f"widen_{kind}{suffix}") else None


def kernel_name(kind: torch.dtype, dtype: torch.dtype) -> str:
    """Return how kernels for weights of `kind` and vectors of `dtype` are called, if there are."""
    suffix = SUFFIX.get(dtype, "?")
    return suffix if kind == dtype else FORMAT.get(kind, "?") + suffix


def write(
    call: Call, matrix: Matrix | None, kind: torch.dtype, dtype: torch.dtype, O: int, I: int
) -> None:
    """Write a matrix that has to map vectors (..., I) of a dtype to (..., O); zeros for None.

    Args:
        kind: the dtype in which weights are stored.
    """
    if matrix is None:
        call.integers(*[0] * 8)
        return
    weight, scale, bias, offset, iq4 = matrix
    call.fit &= offset is None and not iq4
    if kind == dtype:
        call.rows(weight, kind, O, I)
        call.fit &= scale is None
        call.integers(0, 0)
    else:
        groups = -(-I // GROUP)
        columns = I if kind == torch.int8 else groups * GROUP // 2
        stored = (torch.float32, O) if kind == torch.int8 else (torch.bfloat16, O, groups)
        call.fit &= scale is not None
        call.packed(weight, kind, O, columns)
        call.integers(columns)
        call.packed(scale, *stored)
    call.packed(bias, dtype, O)
    call.integers(O)
