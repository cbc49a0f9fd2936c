"""Weights as kernels read them: plain numbers, or small ones that are widened in registers.

A kernel goes along the rows of a weight in steps of so many columns. Of a step it reads what is in
memory once (`stored`), and makes numbers of it (`widened`): all at once, or, where two numbers lie
in a byte, the low halves and then the high ones, whose columns are others (`columns_of`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quintet.kernels.matrix import GROUP, Matrix, power_of_groups
from quintet.triton.launching import capability, cdiv

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# What is in memory: numbers of the vectors' dtype, or
PLAIN = tl.constexpr(0)
BYTES = tl.constexpr(1)
NIBBLES = tl.constexpr(2)
IQ4 = tl.constexpr(3)
# e4m3 of a device that knows it, and its bits for one that does not.
E4M3 = tl.constexpr(4)
E4M3_BITS = tl.constexpr(5)


class KernelWeight(NamedTuple):
    """A weight (O, I), or a stack of them (E, O, I), as arguments of a kernel.

    Attributes:
        weight: what is in memory.
        scale: of groups of columns; a weight that has none stands in its place.
        offset: what is added, as the scale.
        steps: numbers between experts and rows: of the weight, then of scales and offsets.
        constants: what kernels are compiled for: how numbers are held (NUMBERS), of how many
            columns (GROUP) and rows (HEIGHT) there is a scale, or whether a row has one alone,
            which may be multiplied last (WHOLE), and whether there are offsets (OFFSET).
    """

    weight: Tensor
    scale: Tensor
    offset: Tensor
    steps: tuple[int, int, int, int]
    constants: Mapping[str, int]

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        """The run-time arguments of a kernel."""
        return (self.weight, self.scale, self.offset, *self.steps)


def kernel_weight(
    matrix: Matrix, O: int, I: int, dtype: torch.dtype, E: int | None = None
) -> KernelWeight | None:
    """Return a weight for vectors (..., I) of a dtype; None if kernels cannot read either.

    Args:
        O: how many rows it has.
        E: how many there are on top of each other; None for one alone.
    """
    weight, scale, _, offset, iq4, block = matrix
    if dtype not in FLOATS:
        return None
    lead = (O,) if E is None else (E, O)
    if scale is None:
        fits = weight.dtype == dtype and weight.shape == (*lead, I) and _dense(weight)
        return _arguments(weight, weight, weight, _constants(PLAIN)) if fits else None
    if block is not None:
        return _of_blocks(weight, scale, block, lead, I)
    if scale.ndim < weight.ndim:
        scale = scale.unsqueeze(-1)
        offset = None if offset is None else offset.unsqueeze(-1)
    four = weight.dtype == torch.uint8
    wide = cdiv(I, GROUP) * GROUP // 2 if four else I
    group = power_of_groups(I, scale.shape[-1])
    if group is None or weight.shape != (*lead, wide) or scale.shape[:-1] != lead:
        return None
    alike = offset is None or (
        (offset.shape, offset.stride(), offset.dtype) == (scale.shape, scale.stride(), scale.dtype)
    )
    if not alike or not _dense(weight) or not _dense(scale) or weight.dtype.is_floating_point:
        return None
    numbers = (IQ4 if iq4 else NIBBLES) if four else BYTES
    if four and scale.shape[-1] > 1 and group < 32:
        return None
    constants = _constants(
        numbers,
        group=group,
        whole=scale.shape[-1] == 1 and offset is None,
        offset=offset is not None,
    )
    return _arguments(weight, scale, scale if offset is None else offset, constants)


def _of_blocks(
    weight: Tensor, scale: Tensor, block: tuple[int, int], lead: tuple[int, ...], I: int
) -> KernelWeight | None:
    height, wide = block
    blocks = (*lead[:-1], cdiv(lead[-1], height), cdiv(I, wide))
    power = wide >= 16 and wide & (wide - 1) == 0
    fits = weight.shape == (*lead, I) and scale.shape == blocks and _dense(weight) and _dense(scale)
    if not fits or not power or weight.dtype != torch.float8_e4m3fn:
        return None
    knows = capability() >= 89
    constants = _constants(
        E4M3 if knows else E4M3_BITS, group=wide, height=height, whole=blocks[-1] == 1
    )
    return _arguments(weight if knows else weight.view(torch.uint8), scale, scale, constants)


def _constants(
    numbers: tl.constexpr,
    *,
    group: int = 0,
    height: int = 1,
    whole: bool = False,
    offset: bool = False,
) -> Mapping[str, int]:
    return {
        "NUMBERS": numbers.value,
        "GROUP": group,
        "HEIGHT": height,
        "WHOLE": whole,
        "OFFSET": offset,
    }


def _arguments(
    weight: Tensor, scale: Tensor, offset: Tensor, constants: Mapping[str, int]
) -> KernelWeight:
    def steps(x: Tensor) -> tuple[int, int]:
        return x.stride(0) if x.ndim == 3 else 0, x.stride(-2)

    return KernelWeight(weight, scale, offset, (*steps(weight), *steps(scale)), constants)


def _dense(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


@triton.jit
def columns_of(k, BLOCK: tl.constexpr, NUMBERS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the columns of `widened` for a step from k on."""
    if NUMBERS == 2 or NUMBERS == 3:
        j = tl.arange(0, BLOCK // 2)
        c = k + j // 32 * 64 + j % 32 + 32 * HALF
    else:
        c = k + tl.arange(0, BLOCK)
    return c


@triton.jit
def stored(  # type: ignore[no-untyped-def]
    weight, rows, inside, k, K, BLOCK: tl.constexpr, NUMBERS: tl.constexpr
):
    """Return the stored numbers of some rows, which begin `rows` numbers behind `weight`."""
    if NUMBERS == 2 or NUMBERS == 3:
        # A byte for each two numbers; rows are filled up to whole 64s.
        at = k // 2 + tl.arange(0, BLOCK // 2)
        valid = at < tl.cdiv(K, 64) * 32
    else:
        at = k + tl.arange(0, BLOCK)
        valid = at < K
    valid = inside[:, None] & valid[None, :]
    zero: tl.constexpr = 0.0 if NUMBERS == 0 or NUMBERS == 4 else 0
    return tl.load(weight + rows[:, None] + at[None, :], mask=valid, other=zero)


@triton.jit
def widened(  # type: ignore[no-untyped-def]
    raw,
    scale,
    offset,
    rows,
    inside,
    k,
    K,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    NUMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Return the stored numbers decoded in float32; scales of rows are left out.

    Args:
        rows: where the scales of each row begin.
    """
    n = _numbers(raw, HALF, NUMBERS, OFFSET)
    if NUMBERS != 0 and not WHOLE:
        O: tl.constexpr = n.shape[0]
        WIDE: tl.constexpr = n.shape[1]
        # Neighbours that share a scale stand on an axis of their own.
        PACKED: tl.constexpr = NUMBERS == 2 or NUMBERS == 3
        SHARED: tl.constexpr = 32 if PACKED else (GROUP if GROUP < WIDE else WIDE)
        COUNT: tl.constexpr = WIDE // SHARED
        first = k + tl.arange(0, COUNT) * (64 if PACKED else SHARED) + 32 * HALF
        at = rows[:, None] + (first // GROUP)[None, :]
        valid = inside[:, None] & (first < K)[None, :]
        n = tl.reshape(n, [O, COUNT, SHARED])
        n *= tl.load(scale + at, mask=valid, other=0.0).to(tl.float32)[:, :, None]
        if OFFSET:
            n += tl.load(offset + at, mask=valid, other=0.0).to(tl.float32)[:, :, None]
        n = tl.reshape(n, [O, WIDE])
    return n


@triton.jit
def _numbers(raw, HALF: tl.constexpr, NUMBERS: tl.constexpr, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    if NUMBERS == 1:
        # The last bits of 2^23: conversions of integers have a quarter of the speed of sums.
        bits = (raw.to(tl.int32) + 128) | 0x4B000000
        n = bits.to(tl.float32, bitcast=True) - 8388736.0
    elif NUMBERS == 2:
        bits = ((raw >> (4 * HALF)) & 15).to(tl.int32) | 0x4B000000
        # Without offsets, numbers are counted from -8 on.
        n = bits.to(tl.float32, bitcast=True) - (8388608.0 if OFFSET else 8388616.0)
    elif NUMBERS == 3:
        place = ((raw >> (4 * HALF)) & 15).to(tl.int32)
        # The table, four numbers of 8 bits in a word, the first in the lowest.
        low = tl.where(place < 4, -1079142271, -152379953)
        high = tl.where(place < 12, 639175937, 1901675829)
        word = tl.where(place < 8, low, high)
        n = ((word << (24 - 8 * (place & 3))) >> 24).to(tl.float32)
    elif NUMBERS == 5:
        # The same bits make a number 2^8 smaller in float16.
        b = raw.to(tl.uint16)
        bits = ((b & 0x80) << 8) | ((b & 0x7F) << 7)
        half = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        n = tl.where((b & 0x7F) == 0x7F, float("nan"), half)
    else:
        n = raw.to(tl.float32)
    return n
