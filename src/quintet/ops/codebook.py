"""Weights as indices into a table of sixteen numbers: NF4 and FP4 (QLoRA, arXiv:2305.14314, §3).

    w ≈ table[index] · absmax

with one `absmax` for a block of consecutive numbers of the flattened weight, and two indices a
byte, the first one high. Double quantisation holds the absmax in 8 bits: less their mean, 256 of
them to a scale, as indices into a table of 256 that is finer near zero.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import InputError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
# NF4: quantiles of a normal distribution. FP4: a sign, two bits of exponent, one of mantissa.
TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(
        sign * twelfths / 12 for sign in (1, -1) for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3)
    ),
}


def quantize_codes(weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Round to the nearest table entry times each block's largest magnitude.

    Returns packed uint8 (ceil(n / 2), 1) and absmax float32 (ceil(n / block),) for n numbers.

    Raises:
        InputError: a weight is not finite.
    """
    table = torch.tensor(TABLES[kind], dtype=torch.float32, device=weight.device)
    order = table.argsort()
    between = (table[order[:-1]] + table[order[1:]]) / 2
    n = weight.numel()
    flat = weight.reshape(-1)
    packed = flat.new_empty(math.ceil(n / 2), 1, dtype=torch.uint8)
    absmax = flat.new_empty(math.ceil(n / block), dtype=torch.float32)
    for start in range(0, n, _BAND):
        band = flat[start : start + _BAND].to(torch.float32)
        blocks = F.pad(band, (0, -band.numel() % block)).view(-1, block)
        largest = blocks.abs().amax(-1)
        if not bool(largest.isfinite().all()):
            raise InputError("a weight that is NaN or infinite cannot be quantised")
        absmax[start // block :][: len(largest)] = largest
        scaled = (blocks * (1.0 / largest.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1)
        indices = order[torch.bucketize(scaled, between)].to(torch.uint8).view(-1)
        indices = indices[: band.numel() + band.numel() % 2]
        pairs = (indices[::2] << 4) | indices[1::2]
        packed[start // 2 :][: len(pairs), 0] = pairs
    return packed, absmax


def dequantize_codes(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, ...],
    kind: str,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight of `shape`, multiplied in float32 and rounded once."""
    table = torch.tensor(TABLES[kind], dtype=torch.float32, device=packed.device)
    n = math.prod(shape)
    weight = packed.new_empty(n, dtype=dtype)
    codes = packed.reshape(-1)
    for start in range(0, n, _BAND):
        pairs = codes[start // 2 : (start + _BAND) // 2]
        indices = torch.stack((pairs >> 4, pairs & 15), dim=-1).view(-1).to(torch.int32)
        values = table[indices]
        values = F.pad(values, (0, -len(values) % block)).view(-1, block)
        values = values * absmax[start // block :][: len(values), None]
        target = weight[start : start + _BAND]
        target.copy_(values.view(-1)[: len(target)])
    return weight.view(shape)


@dataclass(frozen=True, slots=True)
class NestedScales:
    """8-bit block scales: offset + table[codes] · absmax.

    Shapes: codes uint8 (blocks,), absmax float32 (ceil(blocks / 256),), offset float32 (1,).
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def expand(self) -> Tensor:
        """Return the scales in float32, (blocks,)."""
        values = dynamic_table(self.codes.device)[self.codes.to(torch.int32)]
        scales = self.absmax.repeat_interleave(NESTED_BLOCK)[: len(values)]
        return values * scales + self.offset


def nest(absmax: Tensor) -> NestedScales:
    """Quantise block scales (blocks,) to 8 bits."""
    offset = absmax.mean().reshape(1)
    table = dynamic_table(absmax.device)
    between = (table[:-1] + table[1:]) / 2
    blocks = F.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / largest.clamp(min=1e-38)).unsqueeze(-1)).clamp_(-1, 1)
    codes = torch.bucketize(scaled, between).to(torch.uint8).view(-1)[: len(absmax)]
    return NestedScales(codes, largest, offset)


def dynamic_table(device: torch.device) -> Tensor:
    """Return the 256 values of the dynamic 8-bit type.

    Each decade has twice as many numbers as the one below it (arXiv:1511.04561, §3).
    """
    numbers = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        numbers += [middles, -middles]
    return torch.cat(numbers).sort().values.to(device)


# A multiple of every block size.
_BAND = 2**18
