"""The blocks of GGUF files in C++ are their definitions, bit for bit."""

import pytest
import torch

from ggufwriting import random_blocks
from quintet.gguf.layouts import LAYOUTS
from quintet.gguf.types import BY_NAME
from quintet.kernels.blocks import decode_blocks, split_blocks
from quintet.ops import blocks

KINDS = pytest.mark.parametrize("kind", LAYOUTS)
SUBNORMAL = torch.arange(1, 1024).double().numpy() * 2.0**-24


def rows(kind: str, in_a_row: int, count: int = 48) -> torch.Tensor:
    half = count * in_a_row // 2
    scales = (None, SUBNORMAL)
    parts = [random_blocks(kind, half, seed=n, scales=one) for n, one in enumerate(scales)]
    return torch.cat([torch.from_numpy(part) for part in parts]).reshape(count, -1)


@KINDS
@pytest.mark.parametrize("in_a_row", [1, 3, 4])
def test_they_are_what_the_definition_says(level: str, kind: str, in_a_row: int) -> None:
    raw = rows(kind, in_a_row)
    torch.set_flush_denormal(True)
    try:
        made = [
            decode_blocks(raw, BY_NAME[kind], dtype) for dtype in (torch.float32, torch.bfloat16)
        ]
        parts = split_blocks(raw, BY_NAME[kind])
    finally:
        torch.set_flush_denormal(False)
    for found, dtype in zip(made, (torch.float32, torch.bfloat16), strict=True):
        assert found is not None
        expected = blocks.decode_blocks.definition(raw, BY_NAME[kind], dtype)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    assert parts is not None
    for one, other in zip(parts, blocks.split_blocks.definition(raw, BY_NAME[kind]), strict=True):
        if one is None or other is None:
            assert one is other
        else:
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@KINDS
def test_stacks_keep_their_axes(level: str, kind: str) -> None:
    raw = rows(kind, 2).reshape(4, 12, -1)
    made = decode_blocks(raw, BY_NAME[kind], torch.float32)
    assert made is not None
    assert made.shape == (4, 12, 2 * BY_NAME[kind].weights)


def test_the_rest_is_left_to_torch(level: str) -> None:
    raw, kind = rows("Q8_0", 2), BY_NAME["Q8_0"]
    assert decode_blocks(raw, kind, torch.float16) is None
    assert decode_blocks(raw[:0], kind, torch.float32) is None
    assert decode_blocks(raw[:, ::2], kind, torch.float32) is None
    assert split_blocks(raw.to("meta"), kind) is None
