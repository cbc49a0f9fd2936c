"""What processes have of a matrix in fewer bits stands for what they have of its numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.parallel.placement import Place, Shard, shard_of
from quintet.quantization import EncodedWeight, GroupFormat, Int4Format, Int8Format, WeightFormat
from quintet.quantization.bitsandbytes import CodesFormat
from quintet.quantization.formats import FP8Format
from quintet.quantization.mixed import FP8_ROWS
from quintet.quantization.ordered import OrderedFormat
from quintet.sharding import Cut, Section

FORMATS: dict[str, WeightFormat] = {
    "int8": Int8Format(),
    "int4": Int4Format(),
    "int4 by 32": GroupFormat(4, 32, offset=True),
    "int8 by 16": GroupFormat(8, 16, dtype=torch.float32),
    "int8 by rows": GroupFormat(8, None, dtype=torch.float32),
    "iq4": GroupFormat(4, 32, iq4=True),
    "fp8": FP8Format(),
    "fp8 by rows": FP8Format(FP8_ROWS),
    "nf4": CodesFormat("nf4"),
    "ordered": OrderedFormat(Int8Format()),
}
each_format = pytest.mark.parametrize("name", FORMATS)
SHAPE = (384, 256)


def encoded(held: WeightFormat, shape: tuple[int, int] = SHAPE) -> EncodedWeight:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return EncodedWeight(held, held.encode(weight), shape)


def shard(dim: int, *ranges: tuple[int, int]) -> Shard:
    return Shard(SHAPE, {dim: ranges})


@each_format
@pytest.mark.parametrize(
    "own",
    [
        shard(0, (0, 128)),
        shard(0, (256, 384)),
        shard(0, (0, 128), (256, 384)),
        shard(1, (128, 256)),
        Shard(SHAPE, {0: ((128, 256),), 1: ((0, 128),)}),
    ],
    ids=str,
)
def test_a_part_is_that_of_the_numbers(name: str, own: Shard) -> None:
    whole = encoded(FORMATS[name])
    part = whole.part(own)
    if name == "ordered" and 1 in own.ranges:
        assert part is None
        return
    assert part is not None
    specs = part.format.parts(own.local_shape)
    assert {suffix: tuple(t.shape) for suffix, t in part.parts.items()} == {
        suffix: spec.shape for suffix, spec in specs.items()
    }
    assert torch.equal(part.decode(torch.float32), own.of(whole.decode(torch.float32)))


@each_format
def test_parts_join_to_the_whole(name: str) -> None:
    whole = encoded(FORMATS[name])
    dim = 0 if name == "ordered" else 1
    joined: dict[str, Tensor] = {s: torch.zeros_like(part) for s, part in whole.parts.items()}
    for own in (shard(dim, (0, 128)), shard(dim, (128, SHAPE[dim]))):
        part, shards = whole.part(own), whole.format.shards(own)
        assert part is not None
        assert shards is not None
        for suffix, to in joined.items():
            shards[suffix].put(to, part.parts[suffix])
    for suffix, to in joined.items():
        assert torch.equal(to, whole.parts[suffix]), suffix


@each_format
@settings(deadline=None)
@given(st.integers(0, 1), st.integers(0, 24), st.integers(0, 24))
def test_what_is_alone_is_encoded_as_it_is_in_the_whole(
    name: str, dim: int, first: int, last: int
) -> None:
    held = FORMATS[name]
    start, end = sorted(min(n * 16, SHAPE[dim]) for n in (first, last))
    own = shard(dim, (start, end))
    if start == end or not held.alone(own):
        return
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    there = EncodedWeight(held, held.encode(weight), SHAPE).part(own)
    assert there is not None
    here = held.encode(own.of(weight))
    for suffix, part in here.items():
        if suffix != "_order":
            assert torch.equal(part.view(torch.uint8), there.parts[suffix].view(torch.uint8))


def test_a_range_within_a_block_has_its_scale_and_one_across_two_has_none() -> None:
    whole = encoded(FP8Format())
    within = whole.part(shard(0, (64, 128)))
    assert within is not None
    expected = whole.decode(torch.float32)[64:128]
    assert torch.equal(within.decode(torch.float32), expected)
    assert whole.part(shard(0, (64, 192))) is None
    assert not whole.format.alone(shard(0, (64, 128)))


def test_scales_of_scales_are_read_and_given_up() -> None:
    whole = encoded(CodesFormat("nf4", nested=True))
    assert whole.part(shard(0, (0, 128))) is None
    plain = whole.format.divided
    parts = whole.format.recast(whole.parts, SHAPE, plain)
    assert parts is not None
    assert torch.equal(plain.decode(parts, SHAPE, torch.float32), whole.decode(torch.float32))


@pytest.mark.parametrize(
    ("shape", "cut", "good", "bad"),
    [
        # q_b_proj, 192 rows a head; kv_b_proj, 256; o_proj, 128 columns.
        ((24576, 1536), (0, 128, 192), (2, 16, 64), (128,)),
        ((32768, 512), (0, 128, 256), (2, 16, 128), ()),
        ((7168, 16384), (1, 128, 128), (2, 16, 128), ()),
        # An expert; two processes may have the scale of one block. A dense layer.
        ((2048, 7168), (0, 2048, 1), (2, 16, 32), ()),
        ((18432, 7168), (0, 18432, 1), (2, 16, 48), (32,)),
    ],
)
def test_matrices_of_v3_are_cut_on_blocks(
    shape: tuple[int, int], cut: tuple[int, int, int], good: tuple[int, ...], bad: tuple[int, ...]
) -> None:
    dim, count, width = cut
    cuts = (Cut(dim, (Section(count, width, "heads"),)),)
    for t in (*good, *bad):
        parts = (shard_of("w", shape, cuts, Place(tp=(i, t))) for i in range(t))
        fits = all(FP8Format().shards(part) is not None for part in parts)
        assert fits == (t in good), t
