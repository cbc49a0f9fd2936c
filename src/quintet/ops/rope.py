"""Rotary position embedding (arXiv:2104.09864), with scaling to longer contexts."""

import math

import torch
from torch import Tensor

from quintet.backends import operation
from quintet.configuration.rope import RopeParameters


def inverse_frequencies(rope: RopeParameters, D: int) -> Tensor:
    """Return the D/2 frequencies in float32, 1 / theta^(2i/D) rescaled by `rope_type`.

    "dynamic" has those of "default" here: its own depend on the length (`rotary_angles`).
    """
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D
    frequencies = 1.0 / (rope.rope_theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(rope, frequencies, D)
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def attention_factor(rope: RopeParameters) -> float:
    """Return YaRN's temperature, the factor of cos and sin (arXiv:2309.00071, §3.4)."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def score_factor(rope: RopeParameters) -> float:
    """Return YaRN's factor of attention scores for models with `mscale_all_dim`.

    They give its temperature to all of a query and key, not to the rotated part alone; cos and
    sin then carry only what `mscale` exceeds it by (`attention_factor`).
    """
    if rope.rope_type != "yarn" or not rope.mscale_all_dim:
        return 1.0
    return _mscale(rope.factor, rope.mscale_all_dim) ** 2


def rotary_angles(
    position_ids: Tensor, frequencies: Tensor, rope: RopeParameters
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions (B, T), two of (B, T, D) in float32.

    With "dynamic", the base grows with the length of each row once that exceeds the original one
    (NTK-aware scaling, arXiv:2309.00071, §3.1); a row's result does not depend on other rows.
    """
    positions = position_ids[..., None].to(torch.float32)  # (B, T, 1)
    if rope.rope_type == "dynamic":
        frequencies = _dynamic(rope, frequencies, position_ids)  # (B, 1, D/2)
    angles = positions * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    factor = attention_factor(rope)
    if angles.is_cpu:
        # In float32, a number's last bit depends on where in memory it stands (ADR 21).
        angles = angles.double()
    cos, sin = (turn.to(torch.float32) for turn in (angles.cos(), angles.sin()))
    return cos * factor, sin * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+D/2}) by their angles; x (B, H, T, D), cos and sin (B, T, D)."""
    return rotate_parts((x,), cos, sin)[0]


def rotate_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries (B, H, T, D) and keys (B, K, T, D) as `rotate` or `rotate_interleaved` do."""
    turned = rotate_parts((q, k), cos, sin, neighbours=interleaved)
    return turned[0], turned[1]


@operation("rotary embedding")
def rotate_parts(
    parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor, *, neighbours: bool = False
) -> list[Tensor]:
    """Rotate each (B, H, T, D), in halves or with `neighbours` interleaved."""
    turn = rotate_interleaved if neighbours else _rotated
    return [turn(x, cos, sin) for x in parts]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_2i, x_2i+1) by their angles; shapes as in `rotate`.

    The result has the pairs as (i, i + D/2): a permutation that cancels in the product of a
    query and a key, and saves a copy of both.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = (angles.chunk(2, dim=-1)[0][:, None] for angles in (cos, sin))
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def _dynamic(rope: RopeParameters, frequencies: Tensor, position_ids: Tensor) -> Tensor:
    original = rope.original_max_position_embeddings
    D = 2 * frequencies.shape[-1]
    length = (position_ids.amax(dim=-1, keepdim=True) + 1).clamp(min=original)  # (B, 1)
    stretch = rope.factor * length / original - (rope.factor - 1)
    base = (rope.rope_theta * stretch ** (D / (D - 2)))[..., None]  # (B, 1, 1)
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device=position_ids.device) / D
    return 1.0 / base**exponents


def _yarn(rope: RopeParameters, frequencies: Tensor, D: int) -> Tensor:
    """Interpolate slow dimensions, keep fast ones, ramp between (arXiv:2309.00071, §3.2)."""

    def dimension(rotations: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return D * math.log(wavelengths) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    if low == high:
        high += 0.001  # the ramp becomes a step
    dimensions = torch.arange(D // 2, dtype=torch.float32, device="cpu")
    interpolated = ((dimensions - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * interpolated + frequencies * (1 - interpolated)


def _llama3(rope: RopeParameters, frequencies: Tensor) -> Tensor:
    """Divide the slow frequencies by `factor`, keep the fast ones, blend between (Llama 3.1)."""
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    blend = (original / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slow = wavelengths > original / rope.low_freq_factor
    fast = wavelengths < original / rope.high_freq_factor
    return torch.where(slow, frequencies / rope.factor, torch.where(fast, frequencies, blended))


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
