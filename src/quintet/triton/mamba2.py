"""Mamba-2's mixer between its projections: convolution, states, gate, in three or four launches."""

from collections.abc import Callable

import torch
from torch import Tensor

from quintet.kernels.ssm import MixerWeights
from quintet.triton.conv import WIDEST, convolve
from quintet.triton.launching import takes
from quintet.triton.norm import LONGEST, gated_rms_norm
from quintet.triton.ssm import LARGEST, Sizes, through_states
from quintet.triton.texts import Texts

Through = Callable[
    [
        Tensor,
        Tensor,
        tuple[Tensor, Tensor, Tensor],
        tuple[float, float],
        Sizes,
        Texts,
        Tensor | None,
        Tensor | None,
    ],
    tuple[Tensor, Tensor],
]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def mamba2(
    projected: Tensor,
    weights: MixerWeights,
    *,
    window: Tensor | None,
    state: Tensor | None,
    counts: Tensor | None,
    through: Through | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Compute `ops.mamba2.mix_stepwise`; overwrite the state.

    That is the output (B, T, H·P), the convolution's last inputs (B, W - 1, C), the state
    (B, H, P, N), the convolved channels (B, T, C) and the step sizes (B, T, H).

    Args:
        through: who computes the state space; None for `ssm.through_states`.
    """
    if projected.ndim != 3:
        return None
    (B, T, _), W = projected.shape, weights.taps.shape[-1]
    texts = Texts(n=B, most=T, counts=counts)
    sizes = _fits(projected, weights, texts, window, state)
    if sizes is None or (counts is not None and counts.shape != (B,)):
        return None
    if any(x is not None and len(x) != B for x in (window, state)):
        return None
    C = sizes.H * sizes.P + 2 * sizes.G * sizes.N
    next_window = projected.new_empty(B, W - 1, C)
    next_state = state
    if next_state is None:
        next_state = projected.new_empty(B, sizes.H, sizes.P, sizes.N, dtype=torch.float32)
    rows = projected.reshape(B * T, -1)
    windows, states = (window, next_window), (state, next_state)
    mixed = _mix(rows, weights, sizes, texts, windows, states, through)
    out, convolved, steps = (x.view(B, T, -1) for x in mixed)
    return out, next_window, next_state, convolved, steps


def mix_texts(
    projected: Tensor,
    weights: MixerWeights,
    *,
    texts: Texts,
    window: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute `ops.mamba2_texts.mix_texts`; overwrite window and state."""
    if projected.ndim != 2 or (window is None) != (state is None) or texts.counts is not None:
        return None
    sizes = _fits(projected, weights, texts, window, state)
    if sizes is None:
        return None
    return _mix(projected, weights, sizes, texts, (window, window), (state, state))


def _mix(
    projected: Tensor,
    weights: MixerWeights,
    sizes: Sizes,
    texts: Texts,
    windows: tuple[Tensor | None, Tensor | None],
    states: tuple[Tensor | None, Tensor | None],
    through: Through | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mixed states, the convolved channels and the step sizes of M tokens."""
    taps, conv_bias, *_, norm, num_groups, limits, eps = weights
    scalars = weights.dt_bias, weights.A_log, weights.D
    z, raw, dt = torch.split(projected, [len(norm), len(taps), sizes.H], dim=-1)
    convolved = convolve(raw, taps, conv_bias, texts, *windows)
    through = through or through_states
    y, steps = through(convolved, dt, scalars, limits, sizes, texts, *states)
    return gated_rms_norm(y, z, norm, num_groups, eps), convolved, steps


def _fits(
    projected: Tensor,
    weights: MixerWeights,
    texts: Texts,
    window: Tensor | None,
    state: Tensor | None,
) -> Sizes | None:
    """Return the sizes; None if shapes, steps or dtypes are not such as kernels know."""
    taps, conv_bias, *scalars, norm, num_groups, _, _ = weights
    given = [projected, taps, *scalars, norm, *texts.tensors]
    given += [x for x in (conv_bias, window, state) if x is not None]
    if taps.ndim != 2 or not projected.numel() or not takes(*given):
        return None
    (C, W), H, inner, dtype = taps.shape, scalars[0].numel(), norm.numel(), projected.dtype
    if dtype not in FLOATS or not 0 < W <= WIDEST or not H or num_groups < 1:
        return None
    sizes = Sizes(H, inner // H, num_groups, (C - inner) // 2 // num_groups)
    H, P, G, N = sizes
    fits = (
        H % G == 0
        and 0 < N <= LARGEST
        and 0 < inner // G <= LONGEST
        and (inner, C) == (H * P, H * P + 2 * G * N)
        and projected.shape[-1] == inner + C + H
        and projected.stride(-1) == 1
        and all(x.shape == (H,) and x.is_contiguous() for x in scalars)
        and norm.ndim == 1
        and norm.is_contiguous()
        and (conv_bias is None or (conv_bias.shape == (C,) and conv_bias.is_contiguous()))
        and (
            window is None
            or (window.dtype == dtype and window.shape[1:] == (W - 1, C) and window.stride(-1) == 1)
        )
        and (
            state is None
            or (
                state.dtype == torch.float32
                and state.shape[1:] == (H, P, N)
                and state.stride()[1:] == (P * N, N, 1)
            )
        )
        and all(x.is_contiguous() for x in texts.tensors)
        and (texts.ends is None or texts.ends.shape == (texts.n + 1,))
        and (texts.rows is None or texts.rows.shape == (texts.n,))
        and all(x is None or x.dtype == torch.int32 for x in (texts.ends, texts.rows))
    )
    return sizes if fits else None
