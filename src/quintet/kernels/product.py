"""Linear maps of many vectors, in bfloat16."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quintet.kernels.calls import applies, begin
from quintet.kernels.linear import batch_invariant
from quintet.kernels.matrix import Matrix


def products(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor] | None:
    """Return x·Wᵀ + b for each of `maps`; None where the kernel does not apply.

    Shapes: x (..., I), returns (..., O) for each.
    """
    return _run(x, [(matrix, None) for matrix in maps])


def gated_products(x: Tensor, gate: Matrix, up: Matrix) -> Tensor | None:
    """Return silu(gate x) · up x, rounded once; None where the kernel does not apply.

    Shapes: x (..., I), gate and up (F, I) without a bias; returns (..., F).
    """
    if gate.bias is not None or up.bias is not None or up.scale is not None:
        return None
    made = _run(x, [(gate, up.weight)])
    return None if made is None else made[0]


def _run(x: Tensor, maps: Sequence[tuple[Matrix, Tensor | None]]) -> list[Tensor] | None:
    call = begin()
    # What is made of x below is always plain.
    if call is None or not applies(x) or x.dtype != torch.bfloat16 or not x.ndim or not x.numel():
        return None
    dtype, I = x.dtype, x.shape[-1]
    rows = x.reshape(-1, I)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    M = len(rows)
    call.integers(M, I, len(maps), batch_invariant())
    call.rows(rows, dtype, M, I)
    made = []
    for matrix, up in maps:
        weight, scale, bias = matrix[:3]
        if weight.ndim != 2 or scale is not None:
            return None
        O = len(weight)
        call.rows(weight, dtype, O, I)
        if up is None:
            call.integers(0, 0, 0)
        else:
            call.rows(up, dtype, O, I)
        call.packed(bias, dtype, O)
        made.append(call.output(x, *x.shape[:-1], O))
        call.integers(O)
    return made if call.run("product_bf16") else None
