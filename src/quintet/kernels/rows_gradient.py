"""Gradients of the row-wise operations, recomputed from their inputs."""

import torch
from torch import Tensor

from quintet.kernels.calls import begin
from quintet.kernels.rows import SUFFIX


def rms_norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of x (..., C) and the weight (C) of `rms_norm`."""
    call = begin()
    suffix = SUFFIX.get(x.dtype)
    if call is None or suffix is None or not x.ndim or not x.numel():
        return None
    C = x.shape[-1]
    call.integers(x.numel() // C, C)
    call.real(eps)
    call.copied(x, x.dtype, *x.shape)
    call.packed(weight, x.dtype, C)
    call.copied(grad, x.dtype, *x.shape)
    for_x = call.output(x, *x.shape)
    for_weight = call.output(x, C, dtype=torch.float32)
    return (for_x, for_weight) if call.run(f"rms_norm_back_{suffix}") else None


def silu_gate_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of gate and up (..., F) of `silu_mul`."""
    call = begin()
    suffix = SUFFIX.get(gate.dtype)
    if call is None or suffix is None or not gate.ndim or not gate.numel():
        return None
    F = gate.shape[-1]
    call.integers(gate.numel() // F, F)
    for x in (gate, up, grad):
        call.copied(x, gate.dtype, *gate.shape)
    for_gate, for_up = (call.output(gate, *gate.shape) for _ in range(2))
    return (for_gate, for_up) if call.run(f"silu_back_{suffix}") else None
