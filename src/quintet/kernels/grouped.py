"""Experts of many tokens, in bfloat16."""

import torch
from torch import Tensor

from quintet.kernels.native import POINTER, applies, entry, pointers

__all__ = ["grouped_silu_experts"]


def grouped_silu_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor | None:
    """Compute `ops.moe.looped_experts` with SiLU; None where the kernel does not apply.

    Shapes: x (N, C); indices and weights (N, A); gate_up (E, 2F, C); down (E, C, F); returns
    (N, C). Indices have to be all from 0 to E - 1.
    """
    matrices = (gate_up, down)
    if not applies(x, indices, weights, *matrices) or not all(m.is_contiguous() for m in matrices):
        return None
    if any(t.dtype != torch.bfloat16 for t in (x, *matrices)) or x.stride(-1) != 1:
        return None
    function = entry("quintet_grouped_bf16", POINTER)
    if function is None:
        return None
    N, A = indices.shape
    if len(x) != N or weights.shape != (N, A):
        return None
    E, C, F = down.shape
    indices = indices.to(torch.int64).contiguous()
    shares = weights.to(torch.float32).contiguous()
    out = x.new_empty(N, C)
    tensors = (x, indices, shares, *matrices, out)
    call = pointers([N, A, E, C, F, x.stride(0), *(t.data_ptr() for t in tensors), 0])
    function(call)
    refused = call[-1]
    return None if refused else out
