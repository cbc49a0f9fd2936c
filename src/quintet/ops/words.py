"""4- or 8-bit numbers packed into 32-bit words, lowest bits first."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

WORD = 32


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned numbers in words (..., W), as uint8 (..., W · 32 / bits)."""
    # The bytes of a word are in the order of their bits, as on every machine that PyTorch is for.
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    numbers = octets.new_empty((*octets.shape[:-1], 2 * octets.shape[-1]))
    torch.bitwise_and(octets, 15, out=numbers[..., 0::2])
    torch.bitwise_right_shift(octets, 4, out=numbers[..., 1::2])
    return numbers


def pack_words(numbers: Tensor, bits: int) -> Tensor:
    """Return words int32 (..., ceil(N · bits / 32)) of unsigned numbers uint8 (..., N)."""
    octets = F.pad(numbers, (0, -numbers.shape[-1] % (WORD // bits)))
    if bits == 4:
        octets = octets[..., 0::2] | (octets[..., 1::2] << 4)
    return octets.contiguous().view(torch.int32)
