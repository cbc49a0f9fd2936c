"""Decodes GGUF blocks, type by type; the definition in PyTorch.

A block is a few bytes that stand for 32 or 256 neighbouring weights of a row:

    w = n · scale, or n · scale + offset

with a small whole number n for each weight, and a scale for each 16 or 32 of them. Most types have
their scales in half precision (`d`, and `m` for offsets). Those whose names end in K have a second
level: each group a number of a few bits, in multiples of `d`. The IQ4 types choose n from a table.

Every number is made in float32 by the operations, and in the order, of the format's reference.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.backends import operation
from quintet.gguf.layouts import LAYOUTS
from quintet.gguf.types import BlockType
from quintet.ops.groups import IQ4, pack_numbers
from quintet.ops.quantized import bands


class SplitBlocks(NamedTuple):
    """Decoded integers (N, weights), int8 or table indices, and scales (N, groups)."""

    numbers: Tensor
    scale: Tensor
    offset: Tensor | None = None


def _half(b: Tensor, offset: int) -> Tensor:
    """Read the float16 at byte `offset` of each block, (N, 1)."""
    return b[:, offset : offset + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(b: Tensor) -> Tensor:
    """Return the low nibbles, then the high ones: (..., n) -> (..., 2n)."""
    return torch.cat((b & 15, b >> 4), dim=-1).view(torch.int8)


def _shifts(b: Tensor, steps: int, bits: int) -> Tensor:
    """Extract `bits` bits of each byte at 0, bits, 2·bits …: (N, …, n) -> (N, …, steps, n)."""
    shifts = torch.arange(0, steps * bits, bits, dtype=torch.uint8, device=b.device)
    return ((b.unsqueeze(-2) >> shifts.unsqueeze(-1)) & ((1 << bits) - 1)).view(torch.int8)


def _fifth_bits(b: Tensor, offset: int) -> Tensor:
    """Return 16 · bit j of the four bytes from `offset` on for weight j, (N, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=b.device)
    return (((b[:, offset : offset + 4, None] >> shifts) & 1) << 4).flatten(1).view(torch.int8)


def _q8_0(b: Tensor) -> SplitBlocks:
    return SplitBlocks(b[:, 2:].view(torch.int8), _half(b, 0))


def _q4_0(b: Tensor) -> SplitBlocks:
    return SplitBlocks(_nibbles(b[:, 2:]) - 8, _half(b, 0))


def _q4_1(b: Tensor) -> SplitBlocks:
    return SplitBlocks(_nibbles(b[:, 4:]), _half(b, 0), _half(b, 2))


def _q5_0(b: Tensor) -> SplitBlocks:
    return SplitBlocks((_nibbles(b[:, 6:]) | _fifth_bits(b, 2)) - 16, _half(b, 0))


def _q5_1(b: Tensor) -> SplitBlocks:
    return SplitBlocks(_nibbles(b[:, 8:]) | _fifth_bits(b, 4), _half(b, 0), _half(b, 2))


def _iq4_nl(b: Tensor) -> SplitBlocks:
    return SplitBlocks(_nibbles(b[:, 2:]), _half(b, 0))


def _iq4_xs(b: Tensor) -> SplitBlocks:
    # 4 bits of each scale in a nibble, and 2 more in a word that all share.
    high = _shifts(b[:, 2:4, None], 4, 2).flatten(1)
    low = _shifts(b[:, 4:8, None], 2, 4).flatten(1)
    scale = _half(b, 0) * ((low | (high << 4)) - 32)
    return SplitBlocks(_nibbles(torch.unflatten(b[:, 8:], 1, (8, 16))).flatten(1), scale)


def _q2_k(b: Tensor) -> SplitBlocks:
    numbers = _shifts(torch.unflatten(b[:, 16:80], 1, (2, 32)), 4, 2).flatten(1)
    return SplitBlocks(numbers, _half(b, 80) * (b[:, :16] & 15), -(_half(b, 82) * (b[:, :16] >> 4)))


def _q3_k(b: Tensor) -> SplitBlocks:
    low = _shifts(torch.unflatten(b[:, 32:96], 1, (2, 32)), 4, 2).reshape(-1, 8, 32)
    high = _shifts(b[:, :32], 8, 1)
    sixes = _nibbles(b[:, 96:104]) | (_shifts(b[:, 104:108], 4, 2).flatten(1) << 4)
    return SplitBlocks(((low | (high << 2)) - 4).flatten(1), _half(b, 108) * (sixes - 32))


def _levels_of_k(b: Tensor, numbers: Tensor) -> SplitBlocks:
    """Apply the eight 6-bit scales and offsets in twelve bytes to numbers."""
    a, c, e = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat((a & 63, (e & 15) | ((a >> 6) << 4)), dim=1)
    offset = torch.cat((c & 63, (e >> 4) | ((c >> 6) << 4)), dim=1)
    return SplitBlocks(numbers.flatten(1), _half(b, 0) * scale, -(_half(b, 2) * offset))


def _q4_k(b: Tensor) -> SplitBlocks:
    return _levels_of_k(b, _shifts(torch.unflatten(b[:, 16:], 1, (4, 32)), 2, 4))


def _q5_k(b: Tensor) -> SplitBlocks:
    low = _shifts(torch.unflatten(b[:, 48:], 1, (4, 32)), 2, 4).reshape(-1, 8, 32)
    return _levels_of_k(b, low | (_shifts(b[:, 16:48], 8, 1) << 4))


def _q6_k(b: Tensor) -> SplitBlocks:
    low = _shifts(torch.unflatten(b[:, :128], 1, (2, 64)), 2, 4).reshape(-1, 8, 32)
    high = _shifts(torch.unflatten(b[:, 128:192], 1, (2, 32)), 4, 2).reshape(-1, 8, 32)
    scale = _half(b, 208) * b[:, 192:208].view(torch.int8)
    return SplitBlocks(((low | (high << 4)) - 32).flatten(1), scale)


_SPLITS: Mapping[str, Callable[[Tensor], SplitBlocks]] = MappingProxyType(
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8_0,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "IQ4_NL": _iq4_nl,
        "IQ4_XS": _iq4_xs,
    }
)


@operation("blocks")
def decode_blocks(raw: Tensor, kind: BlockType, dtype: torch.dtype) -> Tensor:
    """Return the weights (..., O, I) of rows of blocks, bytes (..., O, bytes a row)."""
    layout = LAYOUTS[kind.name]
    columns = raw.shape[-1] // kind.nbytes * kind.weights
    weight = raw.new_empty((*raw.shape[:-1], columns), dtype=dtype)
    rows = raw.reshape(-1, raw.shape[-1])
    table = torch.tensor(IQ4, dtype=torch.int8, device=raw.device)
    for band, target in zip(bands(rows, columns), bands(weight.view(-1, columns)), strict=True):
        numbers, scale, offset = _SPLITS[kind.name](band.reshape(-1, kind.nbytes))
        if layout.table:
            numbers = table[numbers.to(torch.int32)]
        groups = torch.unflatten(numbers, 1, (scale.shape[1], -1)) * scale.unsqueeze(-1)
        if offset is not None:
            groups += offset.unsqueeze(-1)
        target.copy_(groups.view(target.shape))
    return weight


@operation("parts of blocks")
def split_blocks(raw: Tensor, kind: BlockType) -> tuple[Tensor, Tensor, Tensor | None]:
    """Split rows of blocks (..., O, bytes per row) losslessly into integers and scales.

    Returns numbers, scales and offsets as `quintet.ops.groups` has them: int8 (..., O, I), or of
    4 bits packed, and (..., O, I / group) in float16, or float32 where the type has two levels.
    """
    layout = LAYOUTS[kind.name]
    columns = raw.shape[-1] // kind.nbytes * kind.weights
    rows = raw.reshape(-1, raw.shape[-1])
    groups = (len(rows), columns // layout.group)
    wide = -(-columns // 64) * 32 if layout.bits == 4 else columns
    numbers = raw.new_empty(
        (len(rows), wide), dtype=torch.uint8 if layout.bits == 4 else torch.int8
    )
    scale = raw.new_empty(groups, dtype=torch.float32 if layout.two_levels else torch.float16)
    offset = torch.empty_like(scale) if layout.offset else None
    start = 0
    for band in bands(rows, columns):
        found = _SPLITS[kind.name](band.reshape(-1, kind.nbytes))
        end = start + len(band)
        n = found.numbers.reshape(len(band), columns)
        if layout.bits == 4:
            # Numbers around zero are counted from 0 on there.
            n = pack_numbers(n if layout.offset or layout.table else n + 8)
        numbers[start:end] = n
        scale[start:end] = found.scale.reshape(len(band), -1)
        if offset is not None and found.offset is not None:
            offset[start:end] = found.offset.reshape(len(band), -1)
        start = end
    lead = raw.shape[:-1]
    return (
        numbers.view(*lead, -1),
        scale.view(*lead, -1),
        None if offset is None else offset.view(*lead, -1),
    )


def has_odd_scales(raw: Tensor, kind: BlockType) -> bool:
    """Return whether any scale or offset is not finite."""
    blocks = raw.reshape(-1, kind.nbytes)
    # All bits of a half's exponent, which are in its second byte.
    places = LAYOUTS[kind.name].halves
    return any(bool(((blocks[:, offset + 1] & 0x7C) == 0x7C).any()) for offset in places)
