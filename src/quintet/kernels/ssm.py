"""Mamba-2's mixer between its projections, fused."""

from typing import NamedTuple

import torch
from torch import Tensor

from quintet.kernels.calls import begin

# Channels are computed this many at a time.
LANES = 16
NAMES = {torch.bfloat16: "mamba2_bf16", torch.float32: "mamba2_f32"}


class MixerWeights(NamedTuple):
    """What a mixer has learned, its projections aside.

    Attributes:
        taps: (C, W) of the convolution.
        conv_bias: (C).
        dt_bias: (H), added to the step sizes.
        A_log: (H), the logarithm of -A.
        D: (H).
        norm: (H·P), the scale behind the gate.
        num_groups: G.
        dt_limits: between which two a step size is clamped.
        eps: of the normalisation.
    """

    taps: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor
    num_groups: int
    dt_limits: tuple[float, float]
    eps: float


def mamba2(
    projected: Tensor,
    weights: MixerWeights,
    *,
    window: Tensor | None,
    state: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Return what `ops.mamba2.mix` defines, or None if the kernel does not apply.

    That is the output (B, T, H·P), the convolution's last inputs (B, W - 1, C), the state
    (B, H, P, N), which is overwritten, the convolved channels (B, T, C) and the steps (B, T, H).
    """
    call = begin()
    taps, conv_bias, *scalars, norm, num_groups, dt_limits, eps = weights
    dtype = projected.dtype
    if call is None or dtype not in NAMES or projected.ndim != 3 or taps.ndim != 2:
        return None
    (B, T, _), (C, W), H, inner = projected.shape, taps.shape, scalars[0].numel(), norm.numel()
    if not H or not B * T or not W or num_groups < 1:
        return None
    P, N = inner // H, (C - inner) // 2 // num_groups
    if H % num_groups or P % LANES or N <= 0 or N % LANES:
        return None
    call.integers(B, T, H, P, num_groups, N, W)
    for number in (*dt_limits, eps):
        call.real(number)
    # Of these sizes all have to be.
    C, inner = H * P + 2 * num_groups * N, H * P
    call.copied(projected, dtype, B, T, inner + C + H)
    call.copied(taps, dtype, C, W)
    call.packed(conv_bias, dtype, C)
    call.copied(window, dtype, B, W - 1, C)
    for scalar in scalars:
        call.packed(scalar, torch.float32, H)
    call.copied(counts, torch.int64, B)
    call.copied(norm, dtype, inner)
    if state is None and call.fit:
        state = projected.new_zeros((B, H, P, N), dtype=torch.float32)
    call.packed(state, torch.float32, B, H, P, N)
    next_window = call.output(projected, B, W - 1, C)
    convolved, dt, _ = (
        call.output(projected, B, T, width, dtype=torch.float32) for width in (C, H, inner)
    )
    out = call.output(projected, B, T, inner)
    if state is None or not call.run(NAMES[dtype]):
        return None
    return out, next_window, state, convolved, dt
