"""What the blocks of a GGUF file mean, type by type: the definition of each, in PyTorch.

A block is a few bytes that stand for 32 or 256 neighbouring weights of a row. `d` is its scale and
`m` its offset, in half precision; `n` is a weight's number, in four bits or so. Types whose names
end in K have a second level: each 16 or 32 weights have a scale of a few bits, in multiples of `d`.

Every number is made in float32 by the operations, and in the order, of the format's reference.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quintet.backends import operation
from quintet.gguf.types import BlockType
from quintet.ops.quantized import bands

__all__ = ["BLOCKS", "decode_blocks", "has_odd_scales"]

# The sixteen values of the IQ4 types.
_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _half(b: Tensor, at: int) -> Tensor:
    """Return the half-precision number at byte `at` of each block, (N, 1)."""
    return b[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _nibbles(b: Tensor) -> Tensor:
    """Return the low halves of bytes, then the high ones: (..., n) -> (..., 2n)."""
    return torch.cat((b & 15, b >> 4), dim=-1)


def _shifts(b: Tensor, steps: int, bits: int) -> Tensor:
    """Return `bits` bits of each byte from 0, bits, 2·bits … on: (N, …, n) -> (N, …, steps, n)."""
    by = torch.arange(0, steps * bits, bits, dtype=torch.uint8, device=b.device)
    return (b.unsqueeze(-2) >> by.unsqueeze(-1)) & ((1 << bits) - 1)


def _fifth_bits(b: Tensor, at: int) -> Tensor:
    """Return bit j of the four bytes from `at` on as sixteen or nothing for weight j, (N, 32)."""
    by = torch.arange(8, dtype=torch.uint8, device=b.device)
    return (((b[:, at : at + 4, None] >> by) & 1) << 4).flatten(1)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].view(torch.int8)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).to(torch.int8) - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b, 2)).to(torch.int8) - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b, 4)) + _half(b, 2)


def _of_table(nibbles: Tensor) -> Tensor:
    table = torch.tensor(_TABLE, dtype=torch.float32, device=nibbles.device)
    return table[nibbles.to(torch.int32)]


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b, 0) * _of_table(_nibbles(b[:, 2:]))


def _iq4_xs(b: Tensor) -> Tensor:
    # 4 bits of each scale in a nibble, and 2 more in a word that all share.
    high = _shifts(b[:, 2:4, None], 4, 2).flatten(1)
    low = _shifts(b[:, 4:8, None], 2, 4).flatten(1)
    scale = (low | (high << 4)).to(torch.int8) - 32
    n = _of_table(_nibbles(torch.unflatten(b[:, 8:], 1, (8, 16))))
    return ((_half(b, 0) * scale).unsqueeze(-1) * n).flatten(1)


def _q2_k(b: Tensor) -> Tensor:
    d, dmin, sc = _half(b, 80), _half(b, 82), b[:, :16]
    n = _shifts(torch.unflatten(b[:, 16:80], 1, (2, 32)), 4, 2).reshape(-1, 16, 16)
    scale, offset = d * (sc & 15), dmin * (sc >> 4)
    return (scale.unsqueeze(-1) * n - offset.unsqueeze(-1)).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    d, s = _half(b, 108), b[:, 96:108]
    low = _shifts(torch.unflatten(b[:, 32:96], 1, (2, 32)), 4, 2).reshape(-1, 8, 32)
    high = _shifts(b[:, :32], 8, 1)
    n = (low | (high << 2)).to(torch.int8) - 4
    sixes = _nibbles(s[:, :8]) | (_shifts(s[:, 8:], 4, 2).flatten(1) << 4)
    scale = d * (sixes.to(torch.int8) - 32)
    return (scale.unsqueeze(-1) * n.reshape(-1, 16, 16)).flatten(1)


def _scales_of_k(s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eight scales and offsets, 6 bits each, that share twelve bytes (N, 12)."""
    a, c, e = s[:, :4], s[:, 4:8], s[:, 8:]
    scale = torch.cat((a & 63, (e & 15) | ((a >> 6) << 4)), dim=1)
    offset = torch.cat((c & 63, (e >> 4) | ((c >> 6) << 4)), dim=1)
    return scale, offset


def _levels_of_k(b: Tensor, n: Tensor) -> Tensor:
    scale, offset = _scales_of_k(b[:, 4:16])
    wide, shift = _half(b, 0) * scale, _half(b, 2) * offset
    return (wide.unsqueeze(-1) * n - shift.unsqueeze(-1)).flatten(1)


def _q4_k(b: Tensor) -> Tensor:
    return _levels_of_k(b, _shifts(torch.unflatten(b[:, 16:], 1, (4, 32)), 2, 4).reshape(-1, 8, 32))


def _q5_k(b: Tensor) -> Tensor:
    low = _shifts(torch.unflatten(b[:, 48:], 1, (4, 32)), 2, 4).reshape(-1, 8, 32)
    return _levels_of_k(b, low | (_shifts(b[:, 16:48], 8, 1) << 4))


def _q6_k(b: Tensor) -> Tensor:
    low = _shifts(torch.unflatten(b[:, :128], 1, (2, 64)), 2, 4).reshape(-1, 8, 32)
    high = _shifts(torch.unflatten(b[:, 128:192], 1, (2, 32)), 4, 2).reshape(-1, 8, 32)
    n = (low | (high << 4)).to(torch.int8) - 32
    scale = _half(b, 208) * b[:, 192:208].view(torch.int8)
    return (scale.unsqueeze(-1) * n.reshape(-1, 16, 16)).flatten(1)


# For each type, the decoder, and where in a block its numbers in half precision are.
_DECODERS: Mapping[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = MappingProxyType(
    {
        "Q4_0": (_q4_0, (0,)),
        "Q4_1": (_q4_1, (0, 2)),
        "Q5_0": (_q5_0, (0,)),
        "Q5_1": (_q5_1, (0, 2)),
        "Q8_0": (_q8_0, (0,)),
        "Q2_K": (_q2_k, (80, 82)),
        "Q3_K": (_q3_k, (108,)),
        "Q4_K": (_q4_k, (0, 2)),
        "Q5_K": (_q5_k, (0, 2)),
        "Q6_K": (_q6_k, (208,)),
        "IQ4_NL": (_iq4_nl, (0,)),
        "IQ4_XS": (_iq4_xs, (0,)),
    }
)
BLOCKS = tuple(_DECODERS)
"""The types that can be decoded."""


@operation("blocks")
def decode_blocks(raw: Tensor, kind: BlockType, dtype: torch.dtype) -> Tensor:
    """Return the weights (..., O, I) of rows of blocks, bytes (..., O, bytes a row)."""
    decode, _ = _DECODERS[kind.name]
    columns = raw.shape[-1] // kind.nbytes * kind.weights
    weight = raw.new_empty((*raw.shape[:-1], columns), dtype=dtype)
    rows = raw.reshape(-1, raw.shape[-1])
    for some, to in zip(bands(rows, columns), bands(weight.view(-1, columns)), strict=True):
        to.copy_(decode(some.reshape(-1, kind.nbytes)).view(to.shape))
    return weight


def has_odd_scales(raw: Tensor, kind: BlockType) -> bool:
    """Tell whether a scale or an offset of a block is not finite."""
    blocks = raw.reshape(-1, kind.nbytes)
    # All bits of a half's exponent, which are in its second byte.
    places = _DECODERS[kind.name][1]
    return any(bool(((blocks[:, at + 1] & 0x7C) == 0x7C).any()) for at in places)
