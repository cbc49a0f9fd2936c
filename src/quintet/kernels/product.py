"""Linear maps of many vectors, in bfloat16."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quintet.kernels.linear import Matrix, fits
from quintet.kernels.native import INTEGER, POINTER, applies, entry, pointers

__all__ = ["gated_products", "products"]


def products(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor] | None:
    """Return x·Wᵀ + b for each of `maps`; None where the kernel does not apply.

    Shapes: x (..., I), returns (..., O) for each.
    """
    return _run(x, [(matrix, None) for matrix in maps])


def gated_products(x: Tensor, gate: Matrix, up: Matrix) -> Tensor | None:
    """Return silu(gate x) · up x, rounded once; None where the kernel does not apply.

    Shapes: x (..., I), gate and up (F, I) without a bias; returns (..., F).
    """
    if gate.bias is not None or up.bias is not None or gate.weight.shape != up.weight.shape:
        return None
    if gate.weight.stride() != up.weight.stride():
        return None
    made = _run(x, [(gate, up)])
    return None if made is None else made[0]


def _run(x: Tensor, maps: Sequence[tuple[Matrix, Matrix | None]]) -> list[Tensor] | None:
    matrices = [matrix for pair in maps for matrix in pair if matrix is not None]
    held = [tensor for matrix in matrices for tensor in matrix if tensor is not None]
    if not applies(x, *held) or x.dtype != torch.bfloat16 or not x.numel():
        return None
    I = x.shape[-1]
    function = entry("quintet_product_bf16", POINTER, INTEGER, POINTER, *(INTEGER,) * 3)
    if function is None or not all(fits(matrix, x.dtype, I, x.dtype) for matrix in matrices):
        return None
    rows = x.reshape(-1, I)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    fields: list[int] = []
    made = []
    for (weight, _, bias), other in maps:
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        made.append(y)
        up = 0 if other is None else other.weight.data_ptr()
        added = 0 if bias is None else bias.data_ptr()
        fields += (weight.data_ptr(), up, added, y.data_ptr(), weight.shape[0], weight.stride(0))
    function(pointers(fields), len(maps), rows.data_ptr(), rows.stride(0), len(rows), I)
    return made
