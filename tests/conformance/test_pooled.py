"""Sequences in a pool get what they get alone, whoever joins and leaves beside them."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import WIDE, Family, each
from quintet.cache import Cache, DynamicCache, PooledCache, QuantizedCache
from quintet.cache.row_memory import DenseRows
from quintet.errors import ContextLengthError, InputError
from quintet.kernels.native import native
from quintet.layers import stack
from support import relative_error

TOLERANCE = 1e-5
V = 90
each_kind = pytest.mark.parametrize("nbits", [None, 8], ids=["dense", "int8"])


def small(family: Family, dtype: torch.dtype = torch.float32) -> Any:
    return family.model_of(**WIDE[family.name]).to(dtype)


def ids_of(*shape: int) -> Tensor:
    return torch.randint(2, V, shape)


def pool_of(model: Any, nbits: int | None = None, rows: int = 4) -> PooledCache:
    return PooledCache(model.config, rows=rows, capacity=80, nbits=nbits)


def run(model: Any, pool: PooledCache, tokens: dict[int, Tensor]) -> dict[int, Tensor]:
    """Give rows the tokens (T,) that follow, in one forward; return their logits (T, V)."""
    given = [tokens.get(row, torch.empty(0, dtype=torch.long)) for row in pool.rows]
    ends = torch.tensor([0, *(len(ids) for ids in given)]).cumsum(0)
    logits = model(torch.cat(given)[None], cu_seq_lens_q=ends, past_key_values=pool).logits[0]
    parts = logits.split([len(ids) for ids in given])
    return {row: own for row, own in zip(pool.rows, parts, strict=True) if row in tokens}


def begun(model: Any, ids: Tensor, nbits: int | None = None) -> PooledCache:
    """A pool of the one row that holds ids (T,)."""
    pool = pool_of(model, nbits, rows=1)
    model(ids[None], past_key_values=pool)
    return pool


def spoil(pool: PooledCache) -> None:
    """Fill the memory that holds no row's tokens with NaN, and codes with the largest one."""
    for slot in pool._memories.tokens:
        for buffer in slot._buffers.whole:
            for index in range(len(buffer)):
                at = pool._table[index].finite if index < len(pool._table) else 0
                buffer[index, :, at:] = float("nan") if buffer.is_floating_point() else 255
    for slot in pool._memories.states:
        for buffer in slot._buffers.whole:
            buffer[len(pool._table) :] = float("nan")


@each
@each_kind
@torch.no_grad()
def test_it_serves_a_batch_as_a_growing_cache_does(family: Family, nbits: int | None) -> None:
    model = small(family)
    pool = pool_of(model, nbits)
    plain: Cache = DynamicCache(model.config)
    if nbits is not None:
        plain = QuantizedCache(model.config, nbits)
    for T in (9, 1, 1, 3, 1):
        ids = ids_of(3, T)
        told = model(ids, past_key_values=plain).logits
        assert relative_error(model(ids, past_key_values=pool).logits, told) < TOLERANCE
    assert pool.lengths(3).tolist() == [15] * 3
    beams = torch.tensor([2, 0, 0, 1])
    ids = ids_of(4, 1)
    for cache in (plain, pool):
        cache.reorder_cache(beams)
    told = model(ids, past_key_values=plain).logits
    assert relative_error(model(ids, past_key_values=pool).logits, told) < TOLERANCE


@each
@each_kind
@torch.no_grad()
def test_who_joins_and_leaves_changes_nobodys_result(family: Family, nbits: int | None) -> None:
    """Random schedules; memory that nobody holds is filled with NaN between any two steps."""
    model = small(family)
    chance = random.Random(5)
    pool = pool_of(model, nbits)
    alone: dict[int, PooledCache] = {}
    for _ in range(30):
        free = 4 - len(pool.rows)
        what = chance.choice(["step", "step", "step", "join", "fork", "free", "rewind"])
        if not pool.rows or (what == "join" and free):
            own = begun(model, ids_of(chance.randint(1, 20)), nbits)
            alone[pool.join(own.extract(own.rows[0]))] = own
        elif what == "fork" and free:
            row = chance.choice(pool.rows)
            alone[pool.fork(row)[0]] = copy.deepcopy(alone[row])
        elif what == "free":
            pool.free(gone := chance.choice(pool.rows))
            del alone[gone]
        elif what == "rewind":
            row = chance.choice(pool.rows)
            own = alone[row]
            length = max(pool.length(row) - chance.randint(0, 3), 1)
            if pool.rewind(row, length) == 0:
                pool.free(row)
                del alone[row]
            else:
                assert own.rewind(own.rows[0], length) == pool.length(row)
        elif pool.rows:
            most = chance.choice([1, 3, 9])
            tokens = {row: ids_of(chance.randint(1, most)) for row in pool.rows}
            if chance.random() < 0.5:
                del tokens[chance.choice(pool.rows)]
            for row, logits in run(model, pool, tokens).items() if tokens else ():
                told = model(tokens[row][None], past_key_values=alone[row]).logits[0]
                assert relative_error(logits, told) < TOLERANCE
                if chance.random() < 0.3:
                    assert pool.snapshot_row(row) == pool.length(row)
                    alone[row].snapshot_row(alone[row].rows[0])
        assert set(alone) == set(pool.rows)
        spoil(pool)


@each
@each_kind
@torch.no_grad()
def test_a_row_goes_on_elsewhere_as_it_would_have(family: Family, nbits: int | None) -> None:
    model = small(family)
    ids, more = ids_of(17), ids_of(1, 3)
    here = begun(model, ids, nbits)
    whole = here.extract(here.rows[0])
    assert len(whole) == 17
    told = model(more, past_key_values=here).logits
    for pool in (begun(model, ids_of(30), nbits), pool_of(model, nbits)):
        for row in pool.rows:
            pool.free(row)
        pool.join(whole)
        assert torch.equal(model(more, past_key_values=pool).logits, told)
    # In parts, of which the states of recurrent layers are with the last.
    head, tail = whole.split(6)
    pool = pool_of(model, nbits)
    row = pool.join(head, tail)
    assert pool.length(row) == 17
    assert torch.equal(model(more, past_key_values=pool).logits, told)


@each
@each_kind
@torch.no_grad()
def test_a_row_goes_back_to_any_snapshot(family: Family, nbits: int | None) -> None:
    model = small(family)
    ids = ids_of(1, 30)
    pool = pool_of(model, nbits)
    logits = []
    for at in range(0, 30, 5):
        logits.append(model(ids[:, at : at + 5], past_key_values=pool).logits)
        pool.snapshot_row(pool.rows[0])
    row = pool.rows[0]
    fork = pool.fork(row)[0]
    for held in (15, 10, 10, 5):
        for one in (row, fork):
            assert pool.rewind(one, held) == held
        again = model(ids[:, held : held + 5].repeat(2, 1), past_key_values=pool).logits
        for index in range(2):
            assert relative_error(again[index], logits[held // 5][0]) < TOLERANCE
    # Into the last forward, as it began at a snapshot.
    assert pool.rewind(row, 8) == 8
    assert pool.rewind(row, 7) == 7
    pool.free(fork)
    told = model(ids[:, :10], use_cache=False).logits[:, 7:] if nbits is None else logits[1][:, 2:]
    assert relative_error(model(ids[:, 7:10], past_key_values=pool).logits, told) < TOLERANCE
    # That one began at none: a recurrent row goes to the snapshot before.
    assert pool.rewind(row, 9) == (5 if model.config.recurrent_layers() else 9)
    if model.config.recurrent_layers():
        assert pool.snapshots(row) == [5]
        with pytest.raises(InputError, match=r"cannot go back to 3 tokens.*copies.*\[5\]"):
            pool.crop(3)
        pool.drop_snapshots(row)
        assert pool.rewind(row, 4) == 0


@each
@torch.no_grad()
def test_rows_keep_their_bits_when_others_come_and_go(family: Family) -> None:
    """At a fixed number of rows, on one thread; with experts, which sum by how many see them."""
    model = small(family)
    exact = not family.routes(model.config)
    texts = [ids_of(n) for n in (12, 7, 20, 9, 14)]
    contents = [(own := begun(model, text)).extract(own.rows[0]) for text in texts]
    steps = ids_of(8, 5)

    def run(*, joins: bool) -> list[Tensor]:
        pool = pool_of(model)
        a, b, c = (pool.join(contents[i]) for i in range(3))
        made = []
        for at in range(8):
            if joins and at in (3, 5):
                pool.free(b)
                b = pool.join(contents[at // 2 + 2])
            tokens = {a: steps[at, 0], b: steps[at, 1 + joins], c: steps[at, 4]}
            ids = torch.stack([tokens[row] for row in pool.rows])[:, None]
            logits = model(ids, past_key_values=pool).logits[:, 0]
            made.append(torch.stack([logits[pool.index(row)] for row in (a, c)]))
        return made

    for one, other in zip(run(joins=False), run(joins=True), strict=True):
        assert relative_error(one, other) < (1e-30 if exact else TOLERANCE)


@each
@pytest.mark.skipif(native().library is None, reason=f"{native().reason}")
@torch.no_grad()
def test_steps_have_the_bits_that_they_have_alone(family: Family) -> None:
    """In bfloat16, of any lengths in one forward, and taken back as drafts are."""
    model = small(family, torch.bfloat16)
    chance = random.Random(1)
    pool, alone = pool_of(model), {}
    for length in (12, 7, 20, 40):
        own = begun(model, ids_of(length))
        alone[pool.join(own.extract(own.rows[0]))] = own
    for _ in range(8):
        tokens = {row: ids_of(chance.randint(1, 4)) for row in pool.rows}
        del tokens[chance.choice(pool.rows)]
        for cache in (pool, *alone.values()):
            cache.snapshot()
        for row, logits in run(model, pool, tokens).items():
            own = alone[row]
            told = model(tokens[row][None], past_key_values=own).logits[0]
            assert torch.equal(logits, told)
            length = pool.length(row) - chance.randint(0, len(tokens[row]))
            assert pool.rewind(row, length) == own.rewind(own.rows[0], length) == length
        spoil(pool)


@each
@pytest.mark.skipif(native().library is None, reason=f"{native().reason}")
@torch.no_grad()
def test_steps_stay_one_call_with_snapshots_of_rows(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(family, torch.bfloat16)
    real, passes = stack.LayerRun.run_fused, []

    def watched(*arguments: Any) -> Tensor | None:
        passes.append(made := real(*arguments))
        return made

    pool = pool_of(model)
    model(ids_of(2, 20), past_key_values=pool)
    monkeypatch.setattr(stack.LayerRun, "run_fused", watched)
    for row in pool.rows:
        pool.snapshot_row(row)
    for T in (1, 3):
        model(ids_of(2, T), past_key_values=pool)
    pool.rewind(pool.rows[0], 20)
    model(ids_of(2, 1), past_key_values=pool)
    assert len(passes) == 3
    assert all(made is not None for made in passes)


@each
def test_any_mode_but_one_with_gradients_may_write(family: Family) -> None:
    model = small(family)
    ids = ids_of(2, 8)
    pool, plain = pool_of(model), DynamicCache(model.config)
    modes = [torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad]
    for at, mode in enumerate(modes):
        with mode():
            told = model(ids[:, 2 * at : 2 * at + 2], past_key_values=plain).logits
            made = model(ids[:, 2 * at : 2 * at + 2], past_key_values=pool).logits
            assert relative_error(made, told) < TOLERANCE
            pool.free(pool.fork(pool.rows[at % 2])[0])
            pool.snapshot()
        with pytest.raises(InputError, match="which no gradient can pass"):
            model(ids[:, :1], past_key_values=pool)
        assert pool.lengths(2).tolist() == [2 * at + 2] * 2


@torch.no_grad()
def test_a_forward_that_fails_leaves_rows_that_have_to_go_back() -> None:
    from families.zamba2 import model_of

    model = model_of()
    ids = ids_of(1, 9)
    pool = pool_of(model)
    model(ids[:, :4], past_key_values=pool)
    row = pool.rows[0]
    pool.snapshot_row(row)

    def fail(*_: Any) -> None:
        raise RuntimeError("halfway")

    broken = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="halfway"):
        model(ids[:, 4:6], past_key_values=pool)
    broken.remove()
    for refused in (
        lambda: model(ids[:, 4:6], past_key_values=pool),
        lambda: pool.fork(row),
        lambda: pool.snapshot_row(row),
    ):
        with pytest.raises(InputError, match=r"failed halfway left .* ahead"):
            refused()
    assert pool.extract(row, stop=2).states is None
    # One that joins afterwards is whole.
    other = pool.join()
    assert pool.rewind(row, 4) == 4
    pool.free(other)
    rest = model(ids[:, 4:], past_key_values=pool).logits
    assert relative_error(rest, model(ids, use_cache=False).logits[:, 4:]) < TOLERANCE


@torch.no_grad()
def test_what_does_not_fit_is_named_and_changes_nothing() -> None:
    from conformance.families import FAMILIES

    model, other = small(FAMILIES[0]), small(FAMILIES[4])
    own = begun(model, ids_of(10))
    whole = own.extract(own.rows[0])
    pool = PooledCache(model.config, rows=2, capacity=12)
    row = pool.join(whole)
    for refused, message in (
        (lambda: pool.extend(row, whole), "holds 10 tokens and the content is of the slots 0 to"),
        (lambda: pool.extract(row, 4, 11), "holds 10 tokens and not those from 4 to 11"),
        (lambda: pool.rewind(row, 11), "holds 10 tokens and cannot go back to 11"),
        (lambda: pool.free(77), "no row 77; in use are"),
        (lambda: pool.fork(row, 2), "2 rows, 1 are in use and 2 more"),
        (lambda: pool_of(model, 8).join(whole), "dense of 3 layers.*keeps int8"),
        (lambda: pool_of(other).join(whole), "dense of 3 layers.*of 2"),
        (lambda: whole.split(10), "cannot be split at 10"),
        (lambda: PooledCache(model.config, rows=0, capacity=1), "rows=0 and capacity=1"),
        (lambda: PooledCache(model.config, rows=1, capacity=1, nbits=5), "5 bits"),
        (lambda: PooledCache(model.config, 1, 1, 8, memory=DenseRows), "nbits=8 names a memory"),
        (lambda: pool.batch_repeat_interleave(3), "2 more are asked"),
    ):
        with pytest.raises(InputError, match=message):
            refused()
    for refused in (
        lambda: model(ids_of(1, 3), past_key_values=pool),
        lambda: PooledCache(model.config, rows=2, capacity=9).join(whole),
    ):
        with pytest.raises(ContextLengthError, match="make a larger one"):
            refused()
    wide = small(FAMILIES[0]).to(torch.bfloat16)
    with pytest.raises(InputError, match=r"holds torch\.float32"):
        wide(ids_of(1, 1), past_key_values=pool)
    states = begun(other, ids_of(6))
    with pytest.raises(InputError, match="without the states of recurrent layers"):
        pool_of(other).join(states.extract(states.rows[0], stop=4))
    assert pool.rows == (row,)
    assert pool.length(row) == 10
    assert torch.equal(pool.extract(row).layers[0][0], whole.layers[0][0])


@each
@pytest.mark.parametrize(
    "way", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}], ids=str
)
def test_generating_over_a_pool_makes_what_a_growing_cache_does(
    family: Family, way: dict[str, Any]
) -> None:
    model = small(family)
    ids, mask = ids_of(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, **way}
    told = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=pool_of(model), **options), told)
