"""Mamba-2's mixer between its projections: convolution, state space, gate (arXiv:2405.21060, §7).

Axis letters as in `quintet.ops.ssd`; C = H·P + 2·G·N are the channels of the convolution.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.kernels.ssm import MixerWeights
from quintet.ops.conv import causal_conv, continued, last_window
from quintet.ops.norm import rms_norm
from quintet.ops.one_pass import mix_in_one_pass
from quintet.ops.ssd import ssd, ssd_step, step_sizes


class Calls(NamedTuple):
    """Modules that must be called because of hooks or adapters.

    Attributes:
        convolve: the convolution, (B, W - 1 + T, C) -> (B, T, C).
        normalise: the norm behind the gate, of y and z (B, T, H·P) each.
    """

    convolve: Callable[[Tensor], Tensor]
    normalise: Callable[[Tensor, Tensor], Tensor]


class Mixed(NamedTuple):
    """The output of a mixer for T tokens.

    Attributes:
        out: (B, T, H·P), what is projected back.
        window: (B, W - 1, C), the last inputs of the convolution.
        state: (B, H, P, N).
        convolved: (B, T, C), which hold x, b and c (`heads_and_groups`).
        dt: (B, T, H), the step sizes, 0 for padding.
    """

    out: Tensor
    window: Tensor
    state: Tensor
    convolved: Tensor
    dt: Tensor


def mix(
    projected: Tensor,
    weights: MixerWeights,
    window: Tensor | None,
    state: Tensor | None,
    counts: Tensor | None,
    *,
    chunk_size: int,
    calls: Calls | None = None,
) -> Mixed:
    """Mix tokens through the state, in one pass if a backend can; the state may be overwritten.

    In one pass where a backend does that, else by `mix_stepwise`, which defines it.

    Shapes: projected (B, T, H·P + C + H), the gate before x, b, c before dt; counts (B,) how many
    of the T are real, None for all.

    Args:
        calls: what is called in place of multiplying with taps and scale; None to multiply.
    """
    fused = (
        None
        if calls is not None
        else mix_in_one_pass(projected, weights, window=window, state=state, counts=counts)
    )
    if fused is None:
        return mix_stepwise(
            projected, weights, window, state, counts, chunk_size=chunk_size, calls=calls
        )
    return Mixed(*fused)


def mix_stepwise(
    projected: Tensor,
    weights: MixerWeights,
    window: Tensor | None,
    state: Tensor | None,
    counts: Tensor | None,
    *,
    chunk_size: int,
    calls: Calls | None = None,
) -> Mixed:
    """Convolve, update the state, gate and normalise; the definition."""
    inner, H = weights.norm.shape[0], weights.D.shape[0]
    C, W = weights.taps.shape
    convolve, normalise = calls or Calls(
        partial(causal_conv, weight=weights.taps, bias=weights.conv_bias),
        partial(
            gated_rms_norm, weight=weights.norm, num_groups=weights.num_groups, eps=weights.eps
        ),
    )
    z, raw, dt = torch.split(projected, [inner, C, H], dim=-1)
    dt = step_sizes(dt, weights.dt_bias, weights.dt_limits, counts)
    A = -weights.A_log.to(dt.dtype).exp()
    wide = continued(raw, window, W)
    convolved = F.silu(convolve(wide))
    x, b, c = heads_and_groups(convolved, weights)
    if projected.shape[1] == 1 and state is not None:
        y, state = ssd_step(x, dt, A, b, c, weights.D, state)
    else:
        y, state = ssd(x, dt, A, b, c, weights.D, state, chunk_size=chunk_size)
    return Mixed(normalise(y.flatten(2), z), last_window(wide, W, counts), state, convolved, dt)


def heads_and_groups(convolved: Tensor, weights: MixerWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Split convolved channels (B, T, C) into x (B, T, H, P), b and c (B, T, G, N)."""
    inner, size = weights.norm.shape[0], (convolved.shape[-1] - weights.norm.shape[0]) // 2
    x, b, c = torch.split(convolved, [inner, size, size], dim=-1)
    G = weights.num_groups
    x = torch.unflatten(x, -1, (weights.D.shape[0], -1))
    return x, torch.unflatten(b, -1, (G, -1)), torch.unflatten(c, -1, (G, -1))


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """Normalise x · silu(z) per group, in float32; return the dtype of `z`."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    gated = torch.unflatten(x.to(dtype) * F.silu(z.to(dtype)), -1, (num_groups, -1))
    return rms_norm(gated, weight.view(num_groups, -1), eps).flatten(-2).to(z.dtype)
