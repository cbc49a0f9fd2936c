"""Experts for many tokens, in bfloat16."""

import torch
from torch import Tensor

from quintet.kernels.calls import begin
from quintet.kernels.linear import batch_invariant


def grouped_silu_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor | None:
    """Compute `ops.moe.looped_experts` with SiLU; None where the kernel does not apply.

    Shapes: x (N, C); indices and weights (N, A); gate_up (E, 2F, C); down (E, C, F); returns
    (N, C). Indices have to be all from 0 to E - 1.
    """
    call = begin()
    if call is None or x.dtype != torch.bfloat16 or indices.ndim != 2 or down.ndim != 3:
        return None
    (N, A), (E, C, F) = indices.shape, down.shape
    call.integers(N, A, E, C, F, batch_invariant())
    call.rows(x, x.dtype, N, C)
    call.chosen(indices, weights, N, A)
    call.packed(gate_up, x.dtype, E, 2 * F, C)
    call.packed(down, x.dtype, E, C, F)
    out = call.output(x, N, C)
    return out if call.run("grouped_bf16") else None
