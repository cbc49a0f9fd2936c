"""Mamba-2's mixer between its projections, in one pass."""

import ctypes

import torch
from torch import Tensor

from quintet.kernels.native import POINTER, REAL, applies, entry, pointers

__all__ = ["mamba2"]

# Channels are computed this many at a time.
LANES = 16
NAMES = {torch.bfloat16: "quintet_mamba2_bf16", torch.float32: "quintet_mamba2_f32"}


def mamba2(
    projected: Tensor,
    taps: Tensor,
    conv_bias: Tensor | None,
    scalars: tuple[Tensor, Tensor, Tensor],
    norm: Tensor,
    *,
    num_groups: int,
    dt_limits: tuple[float, float],
    eps: float,
    window: Tensor | None,
    state: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Return what `ops.mamba2.mix` defines; None where the kernel does not apply.

    That is the output (B, T, H·P), the convolution's last inputs (B, W - 1, C), the state
    (B, H, P, N), which is overwritten, the convolved channels (B, T, C) and the steps (B, T, H).

    Args:
        scalars: dt_bias, A_log and D, (H) each.
    """
    B, T, _ = projected.shape
    H, (C, W), inner, dtype = len(scalars[0]), taps.shape, len(norm), projected.dtype
    P, N = inner // H, (C - inner) // 2 // num_groups
    given = [x for x in (taps, conv_bias, norm, window) if x is not None]
    held = [x for x in (*scalars, state) if x is not None]
    if (
        dtype not in NAMES
        or P % LANES
        or N % LANES
        or projected.numel() == 0
        or not applies(projected, *given, *held)
        or any(x.dtype != dtype for x in given)
        or any(x.dtype != torch.float32 or not x.is_contiguous() for x in held)
    ):
        return None
    function = entry(NAMES[dtype], POINTER)
    if function is None:
        return None
    projected, taps, norm = (x.contiguous() for x in (projected, taps, norm))
    if state is None:
        state = scalars[0].new_zeros(B, H, P, N)
    window = None if window is None else window.contiguous()
    counts = None if counts is None else counts.to(torch.long).contiguous()
    next_window = projected.new_empty(B, W - 1, C)
    convolved, dt, y = (scalars[0].new_empty(B, T, width) for width in (C, H, inner))
    out = projected.new_empty(B, T, inner)
    numbers = (REAL * 3)(*dt_limits, eps)
    tensors = [projected, taps, conv_bias, window, next_window, *scalars, counts, state]
    tensors += [convolved, dt, y, norm, out]
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    function(pointers((B, T, H, P, num_groups, N, W, *addresses, ctypes.addressof(numbers))))
    return out, next_window, state, convolved, dt
