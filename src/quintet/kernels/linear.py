"""Linear maps of few vectors, bound by how fast their weights are read.

A weight is plain (bfloat16, float32), or in the int8 or int4 of `quintet.ops.quantized`. For those,
vectors are rounded to 16 bits in groups of 64, far finer than the bfloat16 they come in, so that
the result is that of the numbers the weight stands for.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.kernels.native import INTEGER, POINTER, applies, entry, pointers

__all__ = ["Matrix", "fits", "kernel_name", "linears", "widen"]

GROUP = 64


class Matrix(NamedTuple):
    """A weight (O, I) and a bias (O).

    Attributes:
        weight: plain (O, I); int8 (O, I); or uint8 (O, ceil(I / 64) · 32), int4 two a byte.
        scale: of int8, float32 (O,); of int4, bfloat16 (O, ceil(I / 64)); None of plain ones.
        bias: (O,) in the dtype of the vectors.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None


SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
FORMAT = {torch.int8: "int8_", torch.uint8: "int4_"}
# Beyond so many vectors, torch's own matrix product is the faster one (docs/lab-notes.md).
MOST_VECTORS: Mapping[str, int] = MappingProxyType(
    {"bf16": 32, "f32": 32, "int8_bf16": 20, "int8_f32": 20, "int4_bf16": 20, "int4_f32": 20}
)


def linears(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor] | None:
    """Return x·Wᵀ + b for each of `maps`, all of one kind; None where the kernel does not apply.

    Shapes: x (..., I), returns (..., O) for each.
    """
    tensors = [tensor for matrix in maps for tensor in matrix if tensor is not None]
    # First: what traces this must see neither its conditions nor the library.
    if not applies(x, *tensors):
        return None
    dtype = x.dtype
    kind = maps[0].weight.dtype
    name = kernel_name(kind, dtype)
    shape = x.shape
    I = shape[-1]
    M = x.numel() // I if I else 0
    if not 0 < M <= MOST_VECTORS.get(name, 0):
        return None
    function = entry(f"quintet_linear_{name}", POINTER, INTEGER, POINTER, INTEGER, INTEGER)
    if function is None:
        return None
    x = x if x.is_contiguous() else x.contiguous()
    fields: list[int] = []
    made = []
    for matrix in maps:
        if not fits(matrix, kind, I, dtype):
            return None
        weight, scale, bias = matrix
        O = weight.shape[0]
        y = x.new_empty((*shape[:-1], O))
        made.append(y)
        fields += (
            weight.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            O,
            weight.stride(0),
        )
    function(pointers(fields), len(maps), x.data_ptr(), M, I)
    return made


def widen(weight: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor | None:
    """Return an int8 or int4 weight (..., O, columns) as numbers, rounded once; or None."""
    kind, suffix = FORMAT.get(weight.dtype), SUFFIX.get(dtype)
    if kind is None or suffix is None or not applies(weight, scale) or not weight.numel():
        return None
    signature = (POINTER, POINTER, POINTER, INTEGER, INTEGER)
    function = entry(f"quintet_widen_{kind}{suffix}", *signature)
    if function is None or not weight.is_contiguous() or not scale.is_contiguous():
        return None
    made = weight.new_empty((*weight.shape[:-1], columns), dtype=dtype)
    rows = made.numel() // columns
    function(weight.data_ptr(), scale.data_ptr(), made.data_ptr(), rows, columns)
    return made


def kernel_name(kind: torch.dtype, dtype: torch.dtype) -> str:
    """Return how kernels for weights of `kind` and vectors of `dtype` are called, if there are."""
    suffix = SUFFIX.get(dtype, "?")
    return suffix if kind == dtype else FORMAT.get(kind, "?") + suffix


def fits(matrix: Matrix, kind: torch.dtype, I: int, dtype: torch.dtype) -> bool:
    """Tell whether a matrix is laid out as kernels read those of `kind`, for vectors (..., I)."""
    weight, scale, bias = matrix
    if weight.dtype != kind or weight.ndim != 2:
        return False
    if bias is not None and (
        bias.dtype != dtype or bias.shape != weight.shape[:1] or not bias.is_contiguous()
    ):
        return False
    if scale is None:
        return kind == dtype and weight.shape[1] == I and weight.stride(1) == 1
    if not weight.is_contiguous() or not scale.is_contiguous():
        return False
    O, groups = weight.shape[0], -(-I // GROUP)
    if kind == torch.int8:
        return weight.shape[1] == I and scale.shape == (O,) and scale.dtype == torch.float32
    stored = (groups * GROUP // 2, (O, groups), torch.bfloat16)
    return (weight.shape[1], scale.shape, scale.dtype) == stored
