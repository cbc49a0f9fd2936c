"""Caches of every kind hold what a plain list of token vectors for each row holds."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.cache import (
    Cache,
    DynamicCache,
    OffloadedCache,
    QuantizedCache,
    Segment,
    StaticCache,
)
from quintet.errors import ContextLengthError, InputError
from quintet.ops.vector_codes import BITS, VectorCode
from support import small_config

LAYERS, K, D, CAPACITY = 2, 2, 4, 24
CPU = torch.device("cpu")
CONFIG = small_config(num_hidden_layers=LAYERS)


def caches() -> list[Cache]:
    return [DynamicCache(CONFIG), StaticCache(CONFIG, CAPACITY)]


def code_of(cache: Cache) -> VectorCode | None:
    return VectorCode(cache.nbits) if isinstance(cache, QuantizedCache) else None


def vectors(tokens: Tensor, layer: int, part: int) -> Tensor:
    """A different (K, D) for every token, layer and part: (B, T) -> (B, K, T, D)."""
    offsets = torch.arange(K * D).reshape(K, 1, D) / 100
    return tokens[:, None, :, None] * 10.0 + layer + part / 2 + offsets


def append(cache: Cache, tokens: Tensor, counts: Tensor | None = None) -> list[tuple[Any, Any]]:
    span = cache.segment(*tokens.shape, CPU, counts)
    held = [
        cache.update(vectors(tokens, i, 0), vectors(tokens, i, 1), i, span) for i in range(LAYERS)
    ]
    cache.advance(span)
    return held


def assert_rows(
    held: list[tuple[Any, Any]], rows: list[list[int]], code: VectorCode | None = None
) -> None:
    for layer, pair in enumerate(held):
        for part, stored in enumerate(pair):
            assert stored.isfinite().all()
            for b, row in enumerate(rows):
                expected = vectors(torch.tensor([row]), layer, part)[0]
                if code is not None:
                    expected = code.decode(*code.encode(expected), expected.dtype)
                assert torch.equal(stored[b, :, : len(row)], expected), (layer, part, b)


# -- any sequence of operations --------------------------------------------------------------

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 7)),
        st.tuples(st.just("ragged"), st.lists(st.integers(0, 5), min_size=6, max_size=6)),
        st.tuples(st.just("crop"), st.integers(-6, 14)),
        st.tuples(st.just("crop-rows"), st.lists(st.integers(-3, 9), min_size=6, max_size=6)),
        st.tuples(st.just("seek"), st.integers(0, 6)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=6)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("fail"), st.integers(1, 3)),
    ),
    max_size=12,
)


class Model:
    """What caches should hold: the tokens of each row."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.next = 1

    def fresh(self, T: int) -> Tensor:
        count = len(self.rows) * T
        tokens = torch.arange(self.next, self.next + count).reshape(-1, T)
        self.next += count
        return tokens

    def extend(self, tokens: Tensor, counts: list[int]) -> None:
        for row, new, count in zip(self.rows, tokens.tolist(), counts, strict=True):
            row.extend(new[:count])

    def crop(self, limits: list[int]) -> None:
        self.rows = [
            row[:limit] if limit >= 0 else row[: max(len(row) + limit, 0)]
            for row, limit in zip(self.rows, limits, strict=True)
        ]


def apply(name: str, value: Any, cache: Cache, model: Model, tokens: Tensor) -> None:
    """Do an operation to a cache, and to the model only where told by the caller."""
    B = len(model.rows)
    if name in ("append", "ragged"):
        counts = torch.tensor(value[:B]) if name == "ragged" else None
        held = append(cache, tokens, counts)
        kept = [tokens.shape[1]] * B if counts is None else counts.tolist()
        after = [
            row + new[:count]
            for row, new, count in zip(model.rows, tokens.tolist(), kept, strict=True)
        ]
        assert_rows(held, after, code_of(cache))
    elif name == "fail":
        span = cache.segment(B, value, CPU, None)
        cache.update(vectors(tokens, 0, 0), vectors(tokens, 0, 1), 0, span)
    elif name == "crop":
        cache.crop(value)
    elif name == "crop-rows":
        cache.crop(torch.tensor(value[:B]))
    elif name == "seek":
        cache.seek(torch.tensor(value))
    elif name == "select":
        cache.batch_select_indices(torch.tensor(value) % B)
    elif name == "repeat":
        cache.batch_repeat_interleave(value)
    else:
        cache.reset()


def apply_to_model(name: str, value: Any, model: Model, tokens: Tensor) -> None:
    B = len(model.rows)
    if name == "append":
        model.extend(tokens, [value] * B)
    elif name == "ragged":
        model.extend(tokens, value[:B])
    elif name in ("crop", "seek"):
        model.crop([value] * B)
    elif name == "crop-rows":
        model.crop(value[:B])
    elif name == "select":
        model.rows = [list(model.rows[i % B]) for i in value]
    elif name == "repeat":
        model.rows = [list(row) for row in model.rows for _ in range(value)]
    elif name == "reset":
        model.rows = [[] for _ in model.rows]


def possible(name: str, value: Any, model: Model) -> bool:
    longest = max(map(len, model.rows))
    if name in ("append", "fail"):
        return longest + value <= CAPACITY
    if name == "ragged":
        return longest + max(*value[: len(model.rows)], 1) <= CAPACITY
    if name == "seek":
        return all(len(row) >= value for row in model.rows)
    return name != "repeat" or len(model.rows) * value <= 6


@settings(max_examples=120, deadline=None, derandomize=True)
@given(rows=st.integers(1, 3), operations=OPERATIONS)
def test_any_operations_leave_what_a_list_of_tokens_would_hold(
    rows: int, operations: list[tuple[str, Any]]
) -> None:
    every = [*caches(), OffloadedCache(CONFIG), *(QuantizedCache(CONFIG, bits) for bits in BITS)]
    model = Model(rows)
    operations = [("append", 2), *operations]  # before, a cache does not know how many rows
    for name, value in operations:
        if not possible(name, value, model):
            continue
        T = max(*value[: len(model.rows)], 1) if name == "ragged" else value
        tokens = model.fresh(T) if name in ("append", "ragged", "fail") else torch.empty(0)
        for cache in every:
            apply(name, value, cache, model, tokens)
        apply_to_model(name, value, model, tokens)
        for cache in every:
            assert cache.lengths(len(model.rows)).tolist() == [len(row) for row in model.rows]
            assert cache.get_seq_length() == max(len(row) for row in model.rows)
            if any(model.rows):
                assert cache.batch_size == len(model.rows)
                assert_rows(list(cache), model.rows, code_of(cache))


# -- one by one ------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", caches(), ids=["dynamic", "static"])
def test_lengths_move_only_when_every_layer_has_stored(cache: Cache) -> None:
    first = torch.arange(1, 7).reshape(2, 3)
    append(cache, first)
    tokens = torch.full((2, 4), 99)
    span = cache.segment(2, 4, CPU, torch.tensor([4, 1]))
    cache.update(vectors(tokens, 0, 0), vectors(tokens, 0, 1), 0, span)
    assert cache.lengths(2).tolist() == [3, 3]
    assert cache.get_seq_length() == 3
    assert_rows(list(cache), first.tolist())
    more = torch.tensor([[7], [8]])
    assert_rows(append(cache, more), [[1, 2, 3, 7], [4, 5, 6, 8]])


@pytest.mark.parametrize("cache", caches(), ids=["dynamic", "static"])
def test_another_number_of_rows_is_named(cache: Cache) -> None:
    append(cache, torch.ones(2, 3))
    with pytest.raises(InputError, match="holds 2 rows and the input has 3"):
        append(cache, torch.ones(3, 1))
    with pytest.raises(InputError, match=r"shape \(3,\) and the cache 2 rows"):
        cache.crop(torch.tensor([1, 1, 1]))
    assert cache.lengths(2).tolist() == [3, 3]


@pytest.mark.parametrize("cache", caches(), ids=["dynamic", "static"])
def test_seek_does_not_jump_ahead(cache: Cache) -> None:
    append(cache, torch.ones(2, 3), torch.tensor([3, 1]))
    for position in (2, -1):
        with pytest.raises(InputError, match=f"cache_position starts at {position}, .* holds 3"):
            cache.seek(torch.tensor(position))
    cache.seek(torch.tensor(1))
    assert cache.lengths(2).tolist() == [1, 1]


@pytest.mark.parametrize("cache", caches(), ids=["dynamic", "static"])
def test_lengths_to_crop_to_are_whole(cache: Cache) -> None:
    for bad in (1.5, float("nan"), float("inf"), "1", None, torch.tensor(1.5), torch.ones(2)):
        with pytest.raises(InputError, match="whole"):
            cache.crop(bad)  # type: ignore[arg-type]
    append(cache, torch.ones(2, 3), torch.tensor([3, 1]))
    cache.crop(10**400)
    assert cache.lengths(2).tolist() == [3, 1]
    cache.crop(-(10**400))
    assert cache.lengths(2).tolist() == [0, 0]


@pytest.mark.parametrize("cache", caches(), ids=["dynamic", "static"])
def test_a_tensor_without_axes_crops_as_a_number_does(cache: Cache) -> None:
    append(cache, torch.ones(2, 5))
    cache.crop(torch.tensor(3))
    assert cache.lengths(2).tolist() == [3, 3]
    append(cache, torch.ones(2, 1))
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("cache", caches(), ids=["dynamic", "static"])
def test_a_cache_without_rows_left_is_empty(cache: Cache) -> None:
    append(cache, torch.ones(2, 3), torch.tensor([3, 1]))
    cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    assert (cache.batch_size, cache.get_seq_length()) == (0, 0)


def test_too_much_for_a_static_cache_is_named_and_changes_nothing() -> None:
    cache = StaticCache(CONFIG, 5)
    assert cache.get_max_cache_shape() == 5
    with pytest.raises(ContextLengthError, match=r"max_cache_len=5 .*holds up to 0 .*given 6"):
        append(cache, torch.ones(2, 6))
    append(cache, torch.ones(3, 4))
    with pytest.raises(ContextLengthError, match=r"max_cache_len=5 .*holds up to 4 .*given 2"):
        append(cache, torch.ones(3, 2))
    append(cache, torch.ones(3, 1))
    assert cache.lengths(3).tolist() == [5, 5, 5]
    with pytest.raises(InputError, match="max_cache_len=0"):
        StaticCache(CONFIG, 0)


@pytest.mark.parametrize("size", [0, -1, 1.5, None, "9", True, [9]], ids=str)
def test_sizes_that_cannot_be_are_named(size: Any) -> None:
    with pytest.raises(InputError, match="max_cache_len="):
        StaticCache(small_config(), size)
    if size is not None:
        with pytest.raises(InputError, match="num_hidden_layers="):
            DynamicCache(num_hidden_layers=size)


def test_what_would_take_all_memory_or_is_no_config_is_named() -> None:
    with pytest.raises(InputError, match=r"num_hidden_layers=1000000000 .* at most 1000"):
        DynamicCache(num_hidden_layers=10**9)
    for wrong in (5, {}, object()):
        with pytest.raises(InputError, match="config is a "):
            DynamicCache(wrong)  # type: ignore[arg-type]


def test_a_static_cache_never_moves() -> None:
    cache = StaticCache(CONFIG, CAPACITY)
    keys, values = append(cache, torch.ones(2, 3))[0]
    places = keys.data_ptr(), values.data_ptr()
    lengths = cache.lengths(2)
    for _ in range(3):
        stored = append(cache, torch.ones(2, 2))[0]
        assert stored[0].shape == stored[1].shape == (2, K, CAPACITY, D)
        assert (stored[0].data_ptr(), stored[1].data_ptr()) == places
    assert cache.lengths(2).data_ptr() == lengths.data_ptr()
    cache.reset()
    assert not keys.any()
    assert append(cache, torch.ones(2, 3))[0][0].data_ptr() == places[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nbytes_is_what_is_held(dtype: torch.dtype) -> None:
    dynamic, static = caches()
    assert dynamic.nbytes == static.nbytes == 0
    for cache in (dynamic, static):
        span = cache.segment(2, 5, CPU, None)
        for layer in range(LAYERS):
            cache.update(
                torch.ones(2, K, 5, D).to(dtype), torch.ones(2, K, 5, D).to(dtype), layer, span
            )
        cache.advance(span)
    one = 2 * LAYERS * 2 * K * D * dtype.itemsize
    assert dynamic.nbytes == 5 * one
    assert static.nbytes == CAPACITY * one
    append(dynamic, torch.ones(2, 1))
    assert dynamic.nbytes == sum(
        x.untyped_storage().nbytes() for layer in dynamic.layers for x in (layer.keys, layer.values)
    )
    dynamic.reset()
    static.reset()
    assert (dynamic.nbytes, static.nbytes) == (0, CAPACITY * one)


def test_growing_copies_seldom() -> None:
    cache = DynamicCache(CONFIG)
    append(cache, torch.ones(1, 1))
    places = {append(cache, torch.ones(1, 1))[0][0].data_ptr() for _ in range(400)}
    assert len(places) < 8


def test_tensors_that_were_handed_in_are_not_written_into() -> None:
    cache = DynamicCache(CONFIG)
    span = cache.segment(1, 4, CPU, None)
    mine = [torch.ones(1, K, 4, D) for _ in range(2 * LAYERS)]
    for layer in range(LAYERS):
        cache.update(mine[2 * layer], mine[2 * layer + 1], layer, span)
    cache.advance(span)
    cache.crop(2)
    append(cache, torch.full((1, 1), 50))
    append(cache, torch.full((1, 1), 51))
    assert all(torch.equal(x, torch.ones(1, K, 4, D)) for x in mine)
    assert_rows([(k[:, :, 2:], v[:, :, 2:]) for k, v in cache], [[50, 51]])


@pytest.mark.parametrize("counts", [None, torch.tensor([2, 1])], ids=["uniform", "ragged"])
def test_gradients_reach_old_and_new_keys(counts: Tensor | None) -> None:
    cache = DynamicCache(num_hidden_layers=1)
    steps = [torch.randn(2, K, 2, D, requires_grad=True) for _ in range(4)]
    total = torch.zeros(())
    for step in steps:
        span = cache.segment(2, 2, CPU, counts)
        keys, values = cache.update(step, 2 * step, 0, span)
        cache.advance(span)
        total = total + keys[1, :, : cache.lengths(2)[1]].square().sum() + values[0].sum()
    gradients = torch.autograd.grad(total, steps)
    length = 2 if counts is None else 1
    for number, (step, gradient) in enumerate(zip(steps, gradients, strict=True)):
        seen = len(steps) - number  # by this forward and all later ones
        expected = 2 * seen * step[1, :, :length]
        torch.testing.assert_close(gradient[1, :, :length], expected)
        assert torch.equal(gradient[0], torch.full((K, 2, D), 2.0 * seen))


def test_lengths_of_rows_before_anything_is_stored() -> None:
    for cache in caches():
        assert cache.lengths(3).tolist() == [0, 0, 0]
        assert cache.batch_size is None
        assert len(cache) == LAYERS
        assert bool(cache)
        cache.crop(0)
        cache.reset()
        cache.batch_repeat_interleave(3)
        with pytest.raises(InputError, match="empty"):
            cache[0]
    assert len(DynamicCache()) == 0


def test_slots_of_a_segment() -> None:
    assert Segment(3, 2, 5, None, CPU).slots().tolist() == [[3, 4]]
    assert Segment(torch.tensor([0, 7]), 3, 10, None, CPU).slots().tolist() == [
        [0, 1, 2],
        [7, 8, 9],
    ]
