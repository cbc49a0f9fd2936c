"""A pool holds what plain lists of tokens say, whatever is done to its rows in whatever order."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from families.zamba2 import small_config as hybrid_config
from quintet.cache import DynamicCache, PooledCache, RowContent, Segment, segments_of
from quintet.cache.row_memory import CodeRows, DenseRows, RowMemory
from quintet.errors import InputError
from quintet.ops.vector_codes import VectorCode
from support import small_config

R, CAPACITY = 4, 70
K, D, W, C = 2, 4, 3, 5
CPU = torch.device("cpu")


def vectors(tokens: list[int], layer: int, part: int) -> Tensor:
    """A different (K, D) for every token, layer and part: (K, T, D)."""
    offsets = torch.arange(K * D).reshape(K, 1, D) / 100
    return (
        torch.tensor(tokens, dtype=torch.float32)[None, :, None] * 10 + layer + part / 2 + offsets
    )


def states(tokens: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """What a recurrent layer has after tokens: the last of them, and a sum that fades."""
    last = [0] * (W - 1) + tokens
    window = torch.tensor(last[len(last) - W + 1 :], dtype=torch.float32)[:, None].repeat(1, C)
    state = torch.zeros(1, 2, 3)
    for token in tokens:
        state = state / 2 + token + layer
    return window, state


class Pools(RuleBasedStateMachine):
    """Operations on a pool of rows, and on lists of tokens."""

    config: Any
    memory: Callable[..., RowMemory] = DenseRows

    def __init__(self) -> None:
        super().__init__()
        self.pool = PooledCache(self.config, rows=R, capacity=CAPACITY, memory=type(self).memory)
        self.attends = self.config.attention_layers()
        self.recurs = self.config.recurrent_layers()
        # By the id of a row: its tokens, and the lengths it has snapshots for.
        self.texts: dict[int, list[int]] = {}
        self.marks: dict[int, set[int]] = {}
        self.extracted: list[tuple[list[int], RowContent]] = []
        self.next = 1

    # -- what is drawn ---------------------------------------------------------------------------

    def row(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.texts)))

    def some_rows(self) -> bool:
        return bool(self.texts)

    def free_rows(self) -> bool:
        return len(self.texts) < R

    # -- rules -------------------------------------------------------------------------------------

    @initialize(rows=st.integers(0, R), length=st.integers(1, 3))
    def begin(self, rows: int, length: int) -> None:
        """As a batch does that has a cache for itself."""
        if rows:
            self.forward([[self.new() for _ in range(length)] for _ in range(rows)], joins=True)

    @precondition(free_rows)
    @rule()
    def join(self) -> None:
        self.add(self.pool.join(), [])

    @precondition(lambda self: self.free_rows() and self.extracted)
    @rule(data=st.data())
    def join_with_content(self, data: st.DataObject) -> None:
        tokens, content = data.draw(st.sampled_from(self.extracted))
        if content.start:
            with pytest.raises(InputError, match="give what follows"):
                self.pool.join(content)
        elif content.states is None:
            with pytest.raises(InputError, match="without the states"):
                self.pool.join(content)
        elif len(content) > 1 and data.draw(st.booleans()):
            parts = content.split(data.draw(st.integers(1, len(content) - 1)))
            self.add(self.pool.join(*parts), tokens)
        else:
            self.add(self.pool.join(content), tokens)

    @precondition(some_rows)
    @rule(data=st.data())
    def extract(self, data: st.DataObject) -> None:
        row = self.row(data)
        text = self.texts[row]
        stop = data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))
        start = data.draw(st.sampled_from(sorted({0, stop // 2})))
        content = self.pool.extract(row, start, stop)
        whole = not self.recurs or stop in (*self.marks[row], len(text), 0)
        assert (content.states is not None) == whole
        self.extracted = [*self.extracted[-5:], (text[:stop], content)]

    @precondition(lambda self: self.some_rows() and self.extracted)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        tokens, content = data.draw(st.sampled_from(self.extracted))
        for row, text in self.texts.items():
            if text == tokens[: content.start] and content.states is not None:
                self.pool.extend(row, content)
                self.texts[row] = tokens
                return

    @precondition(lambda self: self.some_rows() and self.free_rows())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        row = self.row(data)
        copies = data.draw(st.integers(1, R - len(self.texts)))
        for copy in self.pool.fork(row, copies):
            self.add(copy, self.texts[row], self.marks[row])

    @precondition(some_rows)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = self.row(data)
        self.free_again(row)
        with pytest.raises(InputError, match=f"no row {row}"):
            self.pool.length(row)

    @precondition(some_rows)
    @rule(length=st.integers(1, 3))
    def run(self, length: int) -> None:
        self.forward([[self.new() for _ in range(length)] for _ in self.texts])

    @precondition(some_rows)
    @rule(lengths=st.lists(st.integers(0, 3), min_size=R, max_size=R))
    def run_some(self, lengths: list[int]) -> None:
        """As many tokens of each row as it likes, none of some."""
        self.forward([[self.new() for _ in range(n)] for n in lengths[: len(self.texts)]])

    @precondition(lambda self: self.some_rows() and self.recurs)
    @rule(data=st.data(), lengths=st.lists(st.integers(0, 2), min_size=R, max_size=R))
    def fail(self, data: st.DataObject, lengths: list[int]) -> None:
        """A forward that fails halfway; every row that had tokens in it has to go back."""
        given = lengths[: len(self.texts)]
        rows = dict(zip(self.pool.rows, given, strict=True))
        if not self.forward([[self.new() for _ in range(n)] for n in given], fails=True):
            return
        for row, tokens in rows.items():
            if not tokens:
                self.marks[row].add(self.pool.snapshot_row(row))
                continue
            with pytest.raises(InputError, match="failed halfway"):
                self.pool.snapshot_row(row)
            if data.draw(st.booleans()):
                self.free_again(row)
            else:
                self.back(row, len(self.texts[row]), torn=True)

    @precondition(some_rows)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        row = self.row(data)
        self.back(row, data.draw(st.integers(0, len(self.texts[row]))))

    @precondition(some_rows)
    @rule(data=st.data())
    def snapshot_row(self, data: st.DataObject) -> None:
        row = self.row(data)
        self.marks[row].add(self.pool.snapshot_row(row))

    @precondition(some_rows)
    @rule(data=st.data())
    def drop_snapshots(self, data: st.DataObject) -> None:
        row = self.row(data)
        gone = data.draw(st.lists(st.sampled_from(sorted({*self.marks[row], 0})), max_size=2))
        self.pool.drop_snapshots(row, *gone)
        self.marks[row] = self.marks[row].difference(gone) if gone else set()

    @precondition(some_rows)
    @rule()
    def snapshot(self) -> None:
        self.pool.snapshot()
        self.marks = {row: {len(text)} for row, text in self.texts.items()}

    @precondition(some_rows)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        kept = [data.draw(st.integers(0, len(self.texts[row]))) for row in self.pool.rows]
        reached = [
            not self.recurs or n in (*self.marks[row], len(self.texts[row]), 0)
            for row, n in zip(self.pool.rows, kept, strict=True)
        ]
        if not all(reached):
            with pytest.raises(InputError, match="cannot go back"):
                self.pool.crop(torch.tensor(kept))
            return
        self.pool.crop(torch.tensor(kept))
        for row, n in zip(self.pool.rows, kept, strict=True):
            self.cut(row, n)

    @precondition(some_rows)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        before = self.pool.rows
        places = st.integers(0, len(before) - 1)
        indices = data.draw(st.lists(places, min_size=1, max_size=R))
        self.pool.batch_select_indices(torch.tensor(indices))
        texts, marks = self.texts, self.marks
        self.texts, self.marks = {}, {}
        assert len(set(self.pool.rows)) == len(indices)
        for row, index in zip(self.pool.rows, indices, strict=True):
            assert row == before[index] or row not in before
            self.add(row, texts[before[index]], marks[before[index]])

    @rule()
    def reset(self) -> None:
        self.pool.reset()
        self.texts, self.marks = {}, {}

    # -- what holds after each -----------------------------------------------------------------

    @invariant()
    def rows_are_owned_once(self) -> None:
        rows = self.pool.rows
        assert sorted(rows) == sorted(self.texts)
        assert sorted(self.pool.index(row) for row in rows) == list(range(len(rows)))
        assert self.pool.batch_size == (len(rows) or None)
        lengths = [len(self.texts[row]) for row in rows]
        assert self.pool.lengths(len(rows)).tolist() == lengths
        assert self.pool.get_seq_length() == max(lengths, default=0)

    @invariant()
    def what_nobody_holds_may_be_anything(self) -> None:
        rows = list(self.pool._table)
        for index in range(R):
            used = index < len(rows)
            self.fill(index, rows[index].finite if used else 0, states=not used)

    @invariant()
    def content_is_that_of_the_texts(self) -> None:
        for row, text in self.texts.items():
            content = self.pool.extract(row)
            assert (content.start, content.stop) == (0, len(text))
            if text:
                for layer, held in zip(self.attends, content.layers, strict=True):
                    both = (self.coded(vectors(text, layer, part)) for part in (0, 1))
                    for x, told in zip(held, chain.from_iterable(both), strict=True):
                        assert torch.equal(x, told)
            assert content.states is not None
            for layer, held in zip(self.recurs, content.states, strict=True):
                for x, told in zip(held, states(text, layer), strict=False):
                    assert torch.equal(x, told)

        if self.recurs:
            for row, marks in self.marks.items():
                assert self.pool.snapshots(row) == sorted(marks)

    # -- helpers --------------------------------------------------------------------------------

    def new(self) -> int:
        self.next = self.next % 29 + 1
        return self.next

    def fill(self, index: int, start: int, *, states: bool) -> None:
        """Fill memory that nobody holds with NaN, and codes with the largest one."""
        for slot in self.pool._memories.tokens:
            for buffer in slot._buffers.whole:
                buffer[index, :, start:] = float("nan") if buffer.is_floating_point() else 255
        for state in self.pool._memories.states if states else ():
            for buffer in state._buffers.whole:
                buffer[index] = float("nan")

    def coded(self, x: Tensor) -> tuple[Tensor, ...]:
        """What vectors are kept as."""
        return (x,)

    def decoded(self, *kept: Tensor) -> Tensor:
        """What a forward sees of it."""
        return kept[0]

    def add(self, row: int, text: list[int], marks: set[int] | None = None) -> None:
        self.texts[row], self.marks[row] = list(text), set(marks or ())

    def cut(self, row: int, length: int) -> None:
        self.texts[row] = self.texts[row][:length]
        self.marks[row] = {n for n in self.marks[row] if n <= length}

    def free_again(self, row: int) -> None:
        self.fill(self.pool.index(row), 0, states=True)
        self.pool.free(row)
        del self.texts[row], self.marks[row]

    def back(self, row: int, length: int, *, torn: bool = False) -> None:
        reached = self.pool.rewind(row, length)
        expected = length
        if self.recurs and (torn or length != len(self.texts[row])):
            expected = max((n for n in self.marks[row] if n <= length), default=0)
        assert reached == expected
        self.cut(row, reached)

    def forward(self, tokens: list[list[int]], joins: bool = False, fails: bool = False) -> bool:
        """Run what layers would keep of tokens, in the order of the pool's rows, if they fit."""
        taken = [len(new) for new in tokens]
        B, T = len(tokens), max(taken)
        held = [0] * B if joins else [len(self.texts[row]) for row in self.pool.rows]
        if max(n + new for n, new in zip(held, taken, strict=True)) > CAPACITY or not T:
            return False
        counts = None if min(taken) == T else torch.tensor(taken)
        with torch.no_grad():
            whole = self.pool.segment(B, T, CPU, counts)
            if joins:
                for row in self.pool.rows:
                    self.add(row, [])
            texts = [self.texts[row] + new for row, new in zip(self.pool.rows, tokens, strict=True)]
            segments = (whole,) if counts is None else segments_of(whole, taken)
            for layer in sorted({*self.attends, *self.recurs}):
                for segment in segments:
                    rows = segment.rows or slice(None)
                    if layer in self.recurs:
                        both = [states(text, layer) for text in texts[rows]]
                        window, state = (torch.stack(kind) for kind in zip(*both, strict=True))
                        slot = self.pool.recurrent(layer, torch.zeros(B, T, C))
                        slot.update(window, state, segment)
                        if fails:
                            return True
                    if layer in self.attends:
                        self.attend(layer, tokens[rows], texts[rows], segment)
            self.pool.advance(whole)
        for row, text in zip(self.pool.rows, texts, strict=True):
            self.texts[row] = text
        return True

    def attend(
        self, layer: int, tokens: list[list[int]], texts: list[list[int]], segment: Segment
    ) -> None:
        keys, values = (
            torch.stack([vectors(new, layer, part) for new in tokens]) for part in (0, 1)
        )
        held = self.pool.update(keys, values, layer, segment)
        for part, x in enumerate(held):
            assert x.isfinite().all()
            for index, text in enumerate(texts):
                told = self.decoded(*self.coded(vectors(text, layer, part)))
                assert torch.equal(x[index, :, : len(text)], told)


class DensePools(Pools):
    config = small_config(num_hidden_layers=2)


class CodePools(Pools):
    config = small_config(num_hidden_layers=1)
    code = VectorCode(6)
    memory = partial(CodeRows, code=code)

    def coded(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.code.encode(x)

    def decoded(self, *kept: Tensor) -> Tensor:
        return self.code.decode(*kept, torch.float32)


class HybridPools(Pools):
    config = hybrid_config()


quick = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestDensePools = DensePools.TestCase
TestCodePools = CodePools.TestCase
TestHybridPools = HybridPools.TestCase
TestDensePools.settings = TestCodePools.settings = TestHybridPools.settings = quick


def test_places_of_a_pool_are_those_of_its_rows() -> None:
    pool = PooledCache(small_config(), rows=2, capacity=8)
    with pytest.raises(InputError, match="snapshot_row"):
        pool.keep()
    with pytest.raises(InputError, match="rewind"):
        pool.restore(DynamicCache(small_config()).keep())
