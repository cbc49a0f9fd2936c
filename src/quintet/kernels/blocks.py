"""Decodes GGUF blocks to numbers, or to integers with group scales."""

import torch
from torch import Tensor

from quintet.gguf.layouts import LAYOUTS
from quintet.gguf.types import BlockType
from quintet.kernels.calls import begin

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


def decode_blocks(raw: Tensor, kind: BlockType, dtype: torch.dtype) -> Tensor | None:
    """Return the weights (..., O, I) of rows of blocks, bytes (..., O, bytes a row); or None."""
    call = begin()
    suffix = SUFFIX.get(dtype)
    if call is None or suffix is None or not _whole(raw, kind):
        return None
    rows, columns = raw.shape[:-1], raw.shape[-1] // kind.nbytes * kind.weights
    call.integers(rows.numel(), columns)
    call.packed(raw, torch.uint8, *raw.shape)
    made = call.output(raw, *rows, columns, dtype=dtype)
    return made if call.run(f"blocks_{kind.name.lower()}_{suffix}") else None


def split_blocks(raw: Tensor, kind: BlockType) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Convert blocks to our groups: integers, scales and offsets; or None."""
    call = begin()
    if call is None or not _whole(raw, kind):
        return None
    layout = LAYOUTS[kind.name]
    rows, columns = raw.shape[:-1], raw.shape[-1] // kind.nbytes * kind.weights
    four = layout.bits == 4
    call.integers(rows.numel(), columns)
    call.packed(raw, torch.uint8, *raw.shape)
    wide = -(-columns // 64) * 32 if four else columns
    numbers = call.output(raw, *rows, wide, dtype=torch.uint8 if four else torch.int8)
    dtype = torch.float32 if layout.two_levels else torch.float16
    groups = columns // layout.group
    scale = call.output(raw, *rows, groups, dtype=dtype)
    offset = call.output(raw, *rows, groups, dtype=dtype) if layout.offset else None
    if offset is None:
        call.packed(None, dtype)
    return (numbers, scale, offset) if call.run(f"parts_of_{kind.name.lower()}") else None


def _whole(raw: Tensor, kind: BlockType) -> bool:
    """Return whether the rows consist of whole blocks."""
    return raw.ndim > 1 and raw.numel() > 0 and raw.shape[-1] % kind.nbytes == 0
