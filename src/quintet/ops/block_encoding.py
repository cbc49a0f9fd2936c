"""Encodes numbers as GGUF blocks, exactly like the format's reference."""

import torch
from torch import Tensor

from quintet.gguf.types import BlockType

ENCODED = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encode_blocks(weight: Tensor, kind: BlockType) -> Tensor:
    """Return the bytes of numbers in a type of `ENCODED`: (..., C) -> (..., bytes a row), uint8."""
    if kind.name in _PLAIN:
        return weight.to(_PLAIN[kind.name]).contiguous().view(torch.uint8)
    blocks = weight.to(torch.float32).reshape(-1, kind.weights)
    encoded = _q8_0(blocks) if kind.name == "Q8_0" else _q4_0(blocks)
    return encoded.reshape(*weight.shape[:-1], weight.shape[-1] // kind.weights * kind.nbytes)


def _q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(dim=-1, keepdim=True) / 127
    n = x * _inverse(d)
    # Halves are rounded away from nothing, not to even.
    n = n.sign() * (n.abs() + 0.5).floor()
    return torch.cat((_half(d), n.to(torch.int8).view(torch.uint8)), dim=-1)


def _q4_0(x: Tensor) -> Tensor:
    # The largest number, with its sign, becomes the level -8.
    d = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True)) / -8
    n = (x * _inverse(d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    low, high = n.chunk(2, dim=-1)
    return torch.cat((_half(d), low | high << 4), dim=-1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1 / d)


def _half(d: Tensor) -> Tensor:
    return d.to(torch.float16).view(torch.uint8)
