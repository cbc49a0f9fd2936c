"""Parts of tensors: whatever the ranges, pieces put together are the part."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.parallel.placement import Range, Shard

SHAPE = (4, 6, 5)


def ranges(size: int) -> st.SearchStrategy[tuple[Range, ...]]:
    """Ranges of a dimension, in order and apart."""
    borders = st.lists(st.integers(0, size), min_size=2, max_size=4, unique=True).map(sorted)
    return borders.map(lambda b: tuple(zip(b[::2], b[1::2], strict=False)))


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 2), st.integers(0, 0), max_size=3), st.data())
def test_pieces_of_a_stack_fill_the_part_of_it(dims: dict[int, int], data: st.DataObject) -> None:
    shard = Shard(SHAPE, {dim: data.draw(ranges(SHAPE[dim])) for dim in dims})
    whole = torch.arange(4 * 6 * 5).view(SHAPE)
    made = torch.full(shard.local_shape, -1)
    for expert in range(SHAPE[0]):
        for rows in (slice(0, 2), slice(2, 6)):
            found = shard.piece(expert, rows)
            if found is None:
                continue
            own, place = found
            assert own.shape == whole[expert, rows].shape
            made[place].copy_(own.of(whole[expert, rows]))
    assert torch.equal(made, shard.of(whole))


@given(ranges(SHAPE[1]), ranges(SHAPE[2]))
def test_parts_are_put_where_they_are_from(
    rows: tuple[Range, ...], columns: tuple[Range, ...]
) -> None:
    shard = Shard(SHAPE, {1: rows, 2: columns})
    whole, copy = torch.arange(4 * 6 * 5).view(SHAPE), torch.full(SHAPE, -1)
    shard.put(copy, shard.of(whole))
    assert torch.equal(shard.of(copy), shard.of(whole))
    assert int((copy >= 0).sum()) == shard.numel
