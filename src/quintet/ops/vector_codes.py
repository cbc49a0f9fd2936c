"""Quantised vectors: integers with one scale per vector.

A vector x is kept as round(x / s) with s = max|x| / (2^(bits - 1) - 1). This is how keys, values
and latents are stored when memory counts more than the last digits, as in DeepSeek-V2's own
deployment, which keeps 6 bits a number (arXiv:2405.04434, §3.2.3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import InputError, shown

BITS = (8, 6, 4)


@dataclass(frozen=True, slots=True)
class VectorCode:
    """A code of vectors with 8, 6 or 4 bits per number.

    Raises:
        InputError: another number of bits.
    """

    bits: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise InputError(f"{shown(self.bits)} bits: a number of a vector takes 8, 6 or 4")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode x (..., D) to bytes (..., D·bits/8) and bfloat16 scales (..., 1).

        Raises:
            InputError: D numbers do not fill whole bytes.
        """
        parts = {8: 1, 6: 4, 4: 2}[self.bits]
        if x.shape[-1] % parts:
            raise InputError(
                f"vectors of {x.shape[-1]} numbers cannot be kept in {self.bits} bits, which takes "
                f"a multiple of {parts}; use 8"
            )
        top = 2 ** (self.bits - 1) - 1
        x = x.to(torch.float32)
        # Rounded before it is used, so that decoding multiplies by the same number.
        scale = (x.abs().amax(dim=-1, keepdim=True) / top).to(torch.bfloat16)
        steps = scale.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        numbers = (x / steps).round().clamp(-top, top) + (top + 1)
        return _pack(numbers.to(torch.uint8), self.bits), scale

    def decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode bytes and scales to vectors (..., D)."""
        # The bytes wrap around below zero, which is what they mean when read as signed.
        numbers: Tensor = _unpack(codes, self.bits) - 2 ** (self.bits - 1)
        return numbers.view(torch.int8).to(dtype) * scale.to(dtype)


def _pack(numbers: Tensor, bits: int) -> Tensor:
    """Pack numbers (..., D) below 2^bits into bytes."""
    if bits == 8:
        return numbers
    if bits == 4:
        low, high = numbers.chunk(2, dim=-1)
        return low | high << 4
    # The first three quarters take six bits of a byte each, the last is spread over the rest.
    a, b, c, d = numbers.chunk(4, dim=-1)
    return torch.cat((a | d << 6, b | (d >> 2) << 6, c | (d >> 4) << 6), dim=-1)


def _unpack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    if bits == 4:
        return torch.cat((codes & 15, codes >> 4), dim=-1)
    a, b, c = (codes >> 6).chunk(3, dim=-1)
    return torch.cat((codes & 63, a | b << 2 | c << 4), dim=-1)
