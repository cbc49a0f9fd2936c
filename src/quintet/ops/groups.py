"""Group-quantised weights: neighbours in a row share a scale and perhaps an offset.

    8 bits                w ≈ n · scale, or n · scale + offset        n = -128..127
    4 bits                w ≈ (n - 8) · scale, or n · scale + offset  n = 0..15
    4 bits, as IQ4        w ≈ IQ4[n] · scale                          n = 0..15

A weight is (..., O, I); scales and offsets are (..., O, G), in any dtype of floating-point numbers,
and are multiplied and added in float32. How many neighbours a group has follows from G: it is a
power of two from 16 on, or a whole row, and the last group of a row may be cut.

Numbers of 4 bits lie two a byte: of 64 neighbours, byte j holds number j in its low half and number
j + 32 in its high half, so that a wide load and a mask yield 32 neighbours. Rows are filled up to
whole 64s.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.kernels.matrix import power_of_groups

# The levels of GGUF's IQ4_NL and IQ4_XS: denser where weights are.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# So many numbers of 4 bits are packed together.
PACK = 64


def group_count(columns: int, group: int | None) -> int:
    """Return the number of groups in a row of `columns`; None means one per row."""
    return 1 if group is None else math.ceil(columns / group)


def group_size(columns: int, count: int) -> int:
    """Return the group size of a row of `columns` with `count` groups.

    Raises:
        InputError: no power of two makes so many.
    """
    if count == 1:
        return max(columns, 1)
    size = power_of_groups(columns, count)
    if size is None:
        raise InputError(
            f"rows of {columns} numbers have {shown(count)} groups; a group has to be of 16, 32, "
            "64 or another such power of two, or a whole row"
        )
    return size


def number_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Return the shape of the integers of a weight of `shape`, int8 or packed uint8."""
    return shape if bits == 8 else (*shape[:-1], math.ceil(shape[-1] / PACK) * PACK // 2)


def pack_numbers(numbers: Tensor) -> Tensor:
    """Pack numbers 0..15 (..., I) of any integer dtype into uint8 (..., ceil(I / 64) · 32)."""
    wide = F.pad(numbers.to(torch.uint8), (0, -numbers.shape[-1] % PACK))
    low, high = torch.unflatten(wide, -1, (-1, 2, PACK // 2)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def unpack_numbers(packed: Tensor, columns: int) -> Tensor:
    """Return the numbers 0..15 (..., columns) in uint8."""
    halves = torch.unflatten(packed, -1, (-1, PACK // 2))
    return torch.stack((halves & 15, halves >> 4), dim=-2).flatten(-3)[..., :columns]


def spread(of_groups: Tensor, columns: int) -> Tensor:
    """Expand (..., G) per group to (..., columns)."""
    count = of_groups.shape[-1]
    if count == 1:
        return of_groups
    return of_groups.repeat_interleave(group_size(columns, count), dim=-1)[..., :columns]


def widen_groups(
    weight: Tensor, scale: Tensor, offset: Tensor | None, columns: int, *, iq4: bool = False
) -> Tensor:
    """Return the numbers (..., O, columns) in float32.

    Args:
        weight: int8 (..., O, columns), or uint8 of packed numbers.
        iq4: whether packed numbers are places in `IQ4`.
    """
    if weight.dtype == torch.int8:
        numbers = weight.to(torch.float32)
    elif iq4:
        levels = torch.tensor(IQ4, dtype=torch.float32, device=weight.device)
        numbers = levels[unpack_numbers(weight, columns).long()]
    else:
        numbers = unpack_numbers(weight, columns).to(torch.float32)
        if offset is None:
            numbers -= 8
    numbers *= spread(scale.to(torch.float32), columns)
    if offset is not None:
        numbers += spread(offset.to(torch.float32), columns)
    return numbers
