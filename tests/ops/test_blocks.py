"""Blocks are what the package of llama.cpp says they are, bit for bit."""

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from ggufwriting import random_blocks
from quintet.gguf.layouts import LAYOUTS
from quintet.gguf.types import BY_NAME, TYPES
from quintet.ops.blocks import decode_blocks, has_odd_scales, split_blocks
from quintet.ops.groups import widen_groups

each_kind = pytest.mark.parametrize("kind", LAYOUTS)
BLOCKS = 4096
SCALES = {
    "any": None,
    "subnormal": np.arange(1, 1024) * 2.0**-24,
    "negative": -np.arange(1.0, 100.0) / 256,
    "zero": np.array([0.0, -0.0]),
    "the largest": np.array([65504.0, -65504.0]),
}


@pytest.fixture(params=[False, True], ids=["", "flushed"])
def flushed(request: pytest.FixtureRequest) -> Iterator[None]:
    """With and without a processor that takes subnormal floats for zero."""
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(False)


def some(kind: str, scales: str = "any") -> torch.Tensor:
    """Rows of three blocks each, or of one where three are no whole 64 numbers."""
    return torch.from_numpy(random_blocks(kind, BLOCKS, scales=SCALES[scales]))


def reference(raw: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@each_kind
@pytest.mark.parametrize("scales", SCALES)
def test_numbers_are_those_of_the_reference(kind: str, scales: str, flushed: None) -> None:
    raw = some(kind, scales)
    made = decode_blocks.definition(raw, BY_NAME[kind], torch.float32)
    assert same_bits(made, reference(raw, kind))


@each_kind
def test_other_dtypes_are_rounded_once(kind: str) -> None:
    raw = some(kind)
    exact = reference(raw, kind)
    for dtype in (torch.bfloat16, torch.float16):
        made = decode_blocks.definition(raw, BY_NAME[kind], dtype)
        torch.testing.assert_close(made, exact.to(dtype), rtol=0, atol=0)


@each_kind
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("in_a_row", [1, 2, 3])
def test_groups_say_exactly_the_same(kind: str, scales: str, in_a_row: int) -> None:
    raw = some(kind, scales)[: 128 * in_a_row]
    rows = raw.reshape(128, -1)
    columns = in_a_row * BY_NAME[kind].weights
    numbers, scale, offset = split_blocks.definition(rows, BY_NAME[kind])
    layout = LAYOUTS[kind]
    assert numbers.dtype == (torch.uint8 if layout.bits == 4 else torch.int8)
    assert scale.shape == (128, columns // layout.group)
    made = widen_groups(numbers, scale, offset, columns, iq4=layout.table)
    assert same_bits(made.view(-1), reference(raw, kind).view(-1))


@each_kind
def test_rows_and_stacks_keep_their_axes(kind: str) -> None:
    raw = some(kind)[:24].reshape(2, 3, -1)
    made = decode_blocks.definition(raw, BY_NAME[kind], torch.float32)
    assert made.shape == (2, 3, 4 * BY_NAME[kind].weights)
    numbers, scale, offset = split_blocks.definition(raw, BY_NAME[kind])
    for part in (numbers, scale, offset):
        assert part is None or part.shape[:2] == (2, 3)


@each_kind
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_seen(kind: str, value: float) -> None:
    raw = some(kind)
    assert not has_odd_scales(raw, BY_NAME[kind])
    for at in LAYOUTS[kind].halves:
        odd = raw.clone()
        odd[77, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        assert has_odd_scales(odd, BY_NAME[kind])


def test_sizes_are_those_of_the_package() -> None:
    known = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    for number, kind in TYPES.items():
        if number in known:
            assert (kind.weights, kind.nbytes) == known[number]
            assert kind.name == gguf.GGMLQuantizationType(number).name
