"""Mamba-2's mixer with gradients, over packed texts from their beginnings."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.kernels.calls import Call, begin

# Channels are computed this many at a time.
LANES = 16


class Learned(NamedTuple):
    """A mixer's parameters in float32; shapes as in `ops.mamba2.MixerWeights`."""

    taps: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor


def mix_texts(
    projected: Tensor,
    weights: Learned,
    lengths: Sequence[int],
    *,
    num_groups: int,
    dt_limits: tuple[float, float],
    eps: float,
) -> Tensor | None:
    """Return `ops.mamba2.mix` over packed texts, (M, H·P), or None.

    Shapes: projected (M, H·P + C + H), the tokens of all texts; `lengths` sum to M.
    """
    call = _begun(projected, weights, lengths, num_groups, dt_limits, eps)
    if call is None:
        return None
    out = call.output(projected, len(projected), weights.norm.numel())
    return out if call.run("mamba2_learn") else None


def mix_texts_gradient(
    grad: Tensor,
    projected: Tensor,
    weights: Learned,
    lengths: Sequence[int],
    *,
    num_groups: int,
    dt_limits: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Learned] | None:
    """Return the gradients of `projected` and the weights; see `mix_texts`."""
    call = _begun(projected, weights, lengths, num_groups, dt_limits, eps)
    if call is None:
        return None
    (C, W), H, inner = weights.taps.shape, weights.D.numel(), weights.norm.numel()
    call.copied(grad, torch.float32, len(projected), inner)
    found = call.output(projected, *projected.shape)
    taps, bias = call.output(projected, C, W), call.output(projected, C)
    dt_bias, A_log, D = (call.output(projected, H) for _ in range(3))
    norm = call.output(projected, inner)
    if not call.run("mamba2_gradient"):
        return None
    made = Learned(taps, None if weights.conv_bias is None else bias, dt_bias, A_log, D, norm)
    return found, made


def _begun(
    projected: Tensor,
    weights: Learned,
    lengths: Sequence[int],
    num_groups: int,
    dt_limits: tuple[float, float],
    eps: float,
) -> Call | None:
    call = begin()
    if call is None or projected.ndim != 2 or weights.taps.ndim != 2:
        return None
    M, (C, W), H = len(projected), weights.taps.shape, weights.D.numel()
    inner = weights.norm.numel()
    if not H or not M or not W or num_groups < 1:
        return None
    P, N = inner // H, (C - inner) // 2 // num_groups
    if H % num_groups or P % LANES or N <= 0 or N % LANES:
        return None
    call.integers(M, len(lengths), H, P, num_groups, N, W)
    for number in (*dt_limits, eps):
        call.real(number)
    # Of these sizes all have to be.
    C, inner = H * P + 2 * num_groups * N, H * P
    call.packed(torch.tensor(lengths, dtype=torch.int64, device="cpu"), torch.int64, len(lengths))
    call.packed(projected, torch.float32, M, inner + C + H)
    call.packed(weights.taps, torch.float32, C, W)
    call.packed(weights.conv_bias, torch.float32, C)
    for scalar in weights[2:5]:
        call.packed(scalar, torch.float32, H)
    call.packed(weights.norm, torch.float32, inner)
    return call
