"""Which scales and offsets the groups of a weight get: rounding to `quintet.ops.groups`."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import InputError
from quintet.ops.groups import IQ4, group_count, number_shape, pack_numbers

__all__ = ["quantize_groups"]

# Small enough that a band in float32 stays in the cache between its operations.
BAND = 2**18


def quantize_groups(
    weight: Tensor,
    bits: int,
    group: int | None,
    *,
    offset: bool = False,
    dtype: torch.dtype = torch.float16,
    iq4: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round each group to multiples of a scale, from an offset on where there is to be one.

    Args:
        weight: (..., O, I).
        bits: 8 or 4.
        group: how many neighbours share a scale; None for whole rows.
        dtype: of scales and offsets.
        iq4: round to the levels of `IQ4`.

    Returns numbers, scales and offsets as `widen_groups` takes them.

    Raises:
        InputError: a weight is not finite, or too large for a scale of `dtype`.
    """
    columns = weight.shape[-1]
    count = group_count(columns, group)
    size = max(columns, 1) if group is None else group
    numbers = weight.new_empty(
        number_shape(tuple(weight.shape), bits), dtype=torch.int8 if bits == 8 else torch.uint8
    )
    scale = weight.new_empty((*weight.shape[:-1], count), dtype=dtype)
    offsets = torch.empty_like(scale) if offset else None
    flat = weight.reshape(-1, columns)
    height = max(BAND // max(columns, 1), 1)
    for start in range(0, len(flat), height):
        rows = slice(start, start + height)
        band = flat[rows].to(torch.float32)
        # The last group is filled up by what changes neither its largest nor its smallest number.
        band = F.pad(band[None], (0, count * size - columns), mode="replicate")[0]
        band = torch.unflatten(band, -1, (count, size))
        to, by = _fit(band, bits, offset=offset, dtype=dtype, iq4=iq4)
        to = to.flatten(-2)[..., :columns]
        numbers.view(-1, numbers.shape[-1])[rows] = to if bits == 8 else pack_numbers(to)
        scale.view(-1, count)[rows] = by[0]
        if offsets is not None:
            offsets.view(-1, count)[rows] = by[1]
    return numbers, scale, offsets


def _fit(
    band: Tensor, bits: int, *, offset: bool, dtype: torch.dtype, iq4: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return numbers (R, G, n) in float32, and scales and offsets (R, G), of groups (R, G, n)."""
    low, high = band.aminmax(dim=-1)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise InputError(
            "a weight that is NaN or infinite cannot be quantised; the checkpoint is damaged or "
            "its training diverged"
        )
    extreme = torch.where(-low > high, low, high)
    least, most = (-127, 127) if bits == 8 else (-8, 7)
    if offset:
        least, most = (-128, 127) if bits == 8 else (0, 15)
        # Rounded with scales as they are stored.
        by = _stored((high - low) / (most - least), dtype)
        start = _stored(low - least * by, dtype)
    else:
        by = _stored(extreme / (IQ4[0] if iq4 else least), dtype)
        start = torch.zeros_like(by)
    steps = (band - start.unsqueeze(-1)) / torch.where(by == 0, 1.0, by).unsqueeze(-1)
    if iq4:
        levels = torch.tensor(IQ4, dtype=torch.float32, device=band.device)
        numbers = torch.bucketize(steps, (levels[1:] + levels[:-1]) / 2).to(torch.float32)
    else:
        numbers = steps.round_().clamp_(least, most)
        if bits == 4 and not offset:
            numbers += 8
    return numbers, (by, start)


def _stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    stored = values.to(dtype).to(torch.float32)
    if not bool(stored.isfinite().all()):
        raise InputError(
            f"a weight is too large for scales in {str(dtype).removeprefix('torch.')}; use scales "
            "in float32"
        )
    return stored
