"""Row-wise operations between products: normalise, rotate, gate."""

import torch
from torch import Tensor

from quintet.kernels.calls import begin

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """Return x / sqrt(mean(x²) + eps) · weight; x (..., C), weight (C)."""
    call = begin()
    suffix = SUFFIX.get(x.dtype)
    if call is None or suffix is None or not x.ndim or not x.numel():
        return None
    C = x.shape[-1]
    call.integers(x.numel() // C, C)
    call.real(eps)
    call.copied(x, x.dtype, *x.shape)
    call.packed(weight, x.dtype, C)
    made = call.output(x, *x.shape)
    return made if call.run(f"rms_norm_{suffix}") else None


def rotate(
    parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor, *, neighbours: bool = False
) -> list[Tensor] | None:
    """Rotate the pairs (i, i + D/2) of each (B, H, T, D); cos and sin (B or 1, T, D).

    With `neighbours`, the pairs are (2i, 2i + 1), and come back as (i, i + D/2).
    """
    call = begin()
    dtype = cos.dtype
    suffix = SUFFIX.get(dtype)
    if call is None or suffix is None or cos.ndim != 3 or any(x.ndim != 4 for x in parts):
        return None
    (B, _, T, D), turns = parts[0].shape, len(cos)
    if D % 2 or turns not in (1, B) or not parts[0].numel():
        return None
    call.integers(B, T, D, neighbours, turns, len(parts))
    call.packed(cos, dtype, turns, T, D)
    call.packed(sin, dtype, turns, T, D)
    made = []
    for x in parts:
        heads = x.shape[1]
        call.integers(heads)
        call.rows(x, dtype, B, heads, T, D)
        made.append(call.output(x, B, T, heads, D).transpose(1, 2))
    return made if call.run(f"rotate_{suffix}") else None


def silu_mul(gate: Tensor, up: Tensor) -> Tensor | None:
    """Return silu(gate) · up; both (..., F)."""
    return _gated("silu_mul", gate, up) if gate.dtype in SUFFIX else None


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor | None:
    """Return gelu(gate) · up, rounded between the two, in bfloat16; both (..., F)."""
    return _gated("gelu_mul", gate, up) if gate.dtype == torch.bfloat16 else None


def _gated(name: str, gate: Tensor, up: Tensor) -> Tensor | None:
    call = begin()
    if call is None or not gate.ndim or not gate.numel():
        return None
    F = gate.shape[-1]
    call.integers(gate.numel() // F, F)
    call.copied(gate, gate.dtype, *gate.shape)
    call.copied(up, gate.dtype, *gate.shape)
    made = call.output(gate, *gate.shape)
    return made if call.run(f"{name}_{SUFFIX[gate.dtype]}") else None


def sigmoid(x: Tensor) -> Tensor | None:
    """Return σ(x) of few bfloat16 numbers, each independent of the others."""
    call = begin()
    if call is None or x.dtype != torch.bfloat16:
        return None
    call.integers(x.numel())
    call.copied(x, x.dtype, *x.shape)
    made = call.output(x, *x.shape)
    return made if call.run("sigmoid_bf16") else None
