"""A pool of rows that sequences join and leave, in memory allocated once.

The rows in use are the first ones of the memory, without holes, so that a forward over all of them
reads plain tensors. A sequence names its row by an id; where the row lies is the table's affair,
and changes when another leaves.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quintet.cache.base import Cache, check_adapters
from quintet.cache.content import RowContent
from quintet.cache.dense import _slots
from quintet.cache.kept import Kept
from quintet.cache.memories import RowMemories
from quintet.cache.row_memory import CodeRows, DenseRows, RowMemory
from quintet.cache.rows import Row, RowTable, whole_blocks
from quintet.cache.segment import Segment
from quintet.cache.state_rows import StateRows
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import ContextLengthError, InputError
from quintet.ops.transforms import recorded, transformed
from quintet.ops.vector_codes import VectorCode


class PooledCache(Cache):
    """A cache whose rows join, leave, fork and go back independently.

    A forward goes on with the rows in use, in the order of `rows`; an empty pool takes in as many
    as the first forward has. What a row holds moves in memory only where the last one takes the
    place of one that leaves.

    Args:
        config: the model's.
        rows: how many sequences there is room for.
        capacity: how many tokens each.
        nbits: 8, 6 or 4 bits a number of keys, values and latents; None to keep them as they are.
        memory: makes the memory of a layer with attention, of the table of rows and the capacity;
            another kind or layout than those that `nbits` names.

    Raises:
        InputError: a number below 1, another number of bits, or both bits and a memory.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rows: int,
        capacity: int,
        nbits: int | None = None,
        *,
        memory: Callable[[RowTable, int], RowMemory] | None = None,
    ) -> None:
        if rows < 1 or capacity < 1:
            raise InputError(f"rows={rows} and capacity={capacity} have to be at least 1")
        if nbits is not None and memory is not None:
            raise InputError(f"nbits={nbits} names a memory, and memory= is another; give one")
        if nbits is not None:
            memory = partial(CodeRows, code=VectorCode(nbits))
        make = memory or DenseRows
        table = self._table = RowTable(rows)
        self.capacity = capacity
        self._kept = kept = RowMemories()

        def attention() -> RowMemory:
            kept.tokens.append(make(table, capacity))
            return kept.tokens[-1]

        def recurrent() -> StateRows:
            kept.states.append(StateRows(table))
            return kept.states[-1]

        super().__init__(*_slots(config, attention, recurrent))

    # -- rows ------------------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[int, ...]:
        """The ids of the rows in use, in forward order."""
        return tuple(row.id for row in self._table)

    def index(self, row: int) -> int:
        """Return a row's index in a forward.

        Raises:
            InputError: no row in use has this id.
        """
        return self._table.index(row)

    def length(self, row: int) -> int:
        """Return the number of tokens in a row."""
        return self._row(row).length

    @torch.no_grad()
    def join(self, *contents: RowContent) -> int:
        """Take a row into use, empty or with extracted content; return its id.

        Args:
            contents: one behind the other, the first from slot 0 on.

        Raises:
            InputError: all rows are in use, or the contents cannot be put there.
            ContextLengthError: they are longer than a row.
        """
        self._table.check_free(1)
        self._kept.check(0, contents, self.capacity)
        check_adapters(*(one.adapters for one in contents))
        row = self._join(1)[0]
        self._write(row, contents)
        return row.id

    @torch.no_grad()
    def extend(self, row: int, *contents: RowContent) -> None:
        """Append extracted content to a row.

        Raises:
            InputError: it is not what follows, or not of this kind of memory and model.
            ContextLengthError: it is longer than the row.
        """
        own = self._row(row)
        self._check_whole(own)
        self._kept.check(own.length, contents, self.capacity)
        check_adapters(own.adapters if own.length else None, *(one.adapters for one in contents))
        self._write(own, contents)

    @torch.no_grad()
    def extract(self, row: int, start: int = 0, stop: int | None = None) -> RowContent:
        """Copy a row's content for a range of its tokens.

        The states of recurrent layers go with it where the row is at `stop`, or has a snapshot
        there.

        Raises:
            InputError: the row does not hold these tokens.
        """
        own, index = self._row(row), self._table.index(row)
        stop = own.length if stop is None else stop
        if not 0 <= start <= stop <= own.length:
            raise InputError(
                f"row {row} holds {own.length} tokens and not those from {start} to {stop}"
            )
        return replace(self._kept.read(index, start, stop), adapters=own.adapters)

    @torch.no_grad()
    def fork(self, row: int, copies: int = 1) -> list[int]:
        """Copy a row, snapshots included, into new rows; return their ids.

        Raises:
            InputError: too few rows are free, or a failed forward left the row ahead.
        """
        own, index = self._row(row), self._table.index(row)
        self._check_whole(own)
        joined = self._join(copies)
        for copy in joined:
            self._kept.copy(index, self._table.index(copy.id))
            self._kept.share(own, copy)
            copy.length = copy.finite = own.length
            copy.adapters = own.adapters
        self._count()
        return [copy.id for copy in joined]

    @torch.no_grad()
    def free(self, row: int) -> None:
        """Free a row; the last row in use moves into its place.

        Raises:
            InputError: no row in use has this id.
        """
        own, index, last = self._row(row), self._table.index(row), len(self._table) - 1
        self._kept.drop(own)
        if index != last:
            self._kept.copy(last, index)
            # What lies behind is of the row that left.
            self._table[last].finite = self._table[last].length
        self._table.leave(index)
        self._count()
        self.companion = None

    def bytes_of_rows(self) -> tuple[int, int]:
        """Return the bytes of a row without tokens, and of each token.

        Nothing is taken before the first forward.
        """
        return self._kept.bytes_of_rows(self._table.size, self.capacity)

    # -- going back --------------------------------------------------------------------------------

    @torch.no_grad()
    def snapshot_row(self, row: int) -> int:
        """Snapshot a row's recurrent states for `rewind`; return its length.

        Keys and values need no copy. A row can have any number of snapshots.

        Raises:
            InputError: a failed forward left the row ahead.
        """
        own, index = self._row(row), self._table.index(row)
        self._check_whole(own)
        for slot in self._kept.states:
            slot.take(index)
        return own.length

    def snapshots(self, row: int) -> list[int]:
        """Return the lengths at which a row has snapshots."""
        index, states = self._table.index(row), self._kept.states
        return sorted(states[0].taken(index)) if states else []

    def drop_snapshots(self, row: int, *lengths: int) -> None:
        """Drop a row's snapshots at some lengths, or all."""
        self._kept.drop(self._row(row), lengths or None)

    @torch.no_grad()
    def rewind(self, row: int, length: int) -> int:
        """Take a row back to a length, or the nearest one before; return the length reached.

        Keys and values can go back to any length. Recurrent states can to a snapshot, to any point
        in the row's last forward if there was one where it began and it had at most 64 tokens, and
        to the beginning. The tokens from the returned length on have to be given again.

        Raises:
            InputError: the row is not that long.
        """
        own, index = self._row(row), self._table.index(row)
        if not 0 <= length <= own.length:
            raise InputError(f"row {row} holds {own.length} tokens and cannot go back to {length}")
        reached = self._kept.reach(index, length)
        for slot in self._kept.states:
            slot.back(index, reached)
        own.length, own.torn = reached, False
        self._count()
        return reached

    # -- one forward -------------------------------------------------------------------------------

    def segment(
        self, batch: int, length: int, device: torch.device, counts: Tensor | None
    ) -> Segment:
        """Return the slots of the next `length` tokens of `batch` rows, or of `counts` each.

        Raises:
            InputError: another number of rows is in use, a failed forward left one of them ahead,
                or gradients or a program are recorded.
            ContextLengthError: a row has no room for them.
        """
        if torch.is_grad_enabled() or transformed() or recorded():
            raise InputError(
                "a pool's memory is written in place, which no gradient can pass and no program "
                "records; run the model under torch.no_grad() or torch.inference_mode(), or with a "
                "DynamicCache or StaticCache"
            )
        self._look_for_torn()
        self._check_whole(*self._table)
        rows = list(self._table) or [Row(-1)] * batch
        whole = super().segment(batch, length, device, counts)
        taken = [length] * batch if counts is None else counts.tolist()
        ends = [row.length + tokens for row, tokens in zip(rows, taken, strict=True)]
        if (needed := max(ends)) > self.capacity:
            at = ends.index(needed)
            raise ContextLengthError(
                f"the pool has room for capacity={self.capacity} tokens a row, row {at} holds "
                f"{rows[at].length} and was given {taken[at]} more; make a larger one"
            )
        if not len(self._table):
            self._join(batch)
        for row, tokens in zip(self._table, taken, strict=True):
            row.taking = tokens
        self._kept.clear(self._table, ends, whole_blocks(needed, self.capacity))
        pages = self._table.pages(device) if counts is not None else None
        return replace(whole, keys=needed, pages=pages)

    def memory(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Return a layer's rows, each a page; None of codes, and before the first forward."""
        return slot.pair() if isinstance(slot := self.layers[layer_idx], DenseRows) else None

    def made_with(self, adapters: tuple[Hashable, ...]) -> None:
        """Record the adapters that tokens are computed with, one per row or one for all.

        Raises:
            InputError: a row that takes tokens holds some that were made with others.
        """
        rows = len(self._table)
        for row, own in zip(
            self._table, adapters * (rows if len(adapters) == 1 else 1), strict=False
        ):
            if row.taking:
                check_adapters(row.adapters if row.length else None, own)
                row.adapters = own

    def advance(self, segment: Segment) -> None:
        """Count the tokens that every layer has stored."""
        super().advance(segment)
        self._counted()
        for row in self._table:
            row.taking = 0
            row.finite = max(row.finite, whole_blocks(segment.keys, self.capacity))

    # -- a step of fixed shapes (`quintet.cache.fixed`) --------------------------------------------

    @torch.no_grad()
    def begin_step(self, indices: Sequence[int], slots: int) -> None:
        """Announce that the rows at some indices get a token, written by the caller.

        All hold numbers in so many slots then. Until `end_step`, rows are as of a failed forward.

        Raises:
            InputError: an earlier forward that failed left a row ahead.
        """
        self._look_for_torn()
        self._check_whole(*self._table)
        self._kept.clear(self._table, [0] * len(self._table), slots)
        for index, row in enumerate(self._table):
            row.taking = int(index in indices)
            row.finite = max(row.finite, slots)
        self._forward_unfinished = bool(self._kept.states)

    def end_step(self) -> None:
        """Count the tokens announced by `begin_step`."""
        self._forward_unfinished = False
        for slot in self._kept.states:
            slot.stepped()
        for row in self._table:
            row.length += row.taking
            row.taking = 0
        self._count()

    @property
    def batch_size(self) -> int | None:
        """The number of rows in use, or None."""
        return len(self._table) or None

    def get_max_cache_shape(self) -> int | None:
        """Return the number of tokens a row can hold."""
        return self.capacity

    # -- all rows at once --------------------------------------------------------------------------

    @torch.no_grad()
    def crop(self, max_length: int | Tensor) -> None:
        """Keep the first `max_length` tokens of every row, or of each row with a (B,) tensor.

        Raises:
            InputError: a tensor of another shape than (B,), or recurrent layers have no snapshot
                at that length.
        """
        self._look_for_torn()
        self._forward_unfinished = any(row.torn for row in self._table)
        super().crop(max_length)
        self._counted()

    @torch.no_grad()
    def snapshot(self) -> None:
        """Snapshot all rows at their present lengths, replacing earlier snapshots.

        Raises:
            InputError: a failed forward left a row ahead.
        """
        self._look_for_torn()
        self._check_whole(*self._table)
        super().snapshot()

    def keep(self) -> Kept:
        """Raise InputError: a pool snapshots its rows one by one."""
        raise InputError("a pool keeps places of its rows: snapshot_row(row), rewind(row, length)")

    def restore(self, kept: Kept) -> None:
        """Raise InputError, as `keep` does."""
        self.keep()

    @torch.no_grad()
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices` (N,), in that order; repeated ones are copied.

        Raises:
            InputError: these are more rows than the pool has.
        """
        self._table.check_free(len(indices) - len(self._table))
        self._look_for_torn()
        before = list(self._table)
        super().batch_select_indices(indices)
        copies = self._table.select(indices.tolist())
        for copy, row in copies:
            self._kept.share(row, copy)
        for row in set(before).difference(self._table):
            self._kept.drop(row)
        for index, row in enumerate(self._table):
            if index >= len(before) or before[index] is not row:
                row.finite = row.length
        self._count()

    def reset(self) -> None:
        """Free all rows; memory stays."""
        super().reset()
        self._table.clear()

    # -- within ------------------------------------------------------------------------------------

    def _row(self, row: int) -> Row:
        self._look_for_torn()
        return self._table[self._table.index(row)]

    def _check_whole(self, *rows: Row) -> None:
        for row in rows:
            if row.torn:
                raise InputError(
                    f"a forward that failed halfway left recurrent layers ahead of row {row.id}; "
                    "rewind it, or free it"
                )

    def _join(self, rows: int) -> list[Row]:
        joined = self._table.join(rows)
        for row in joined:
            for slot in self._kept.states:
                slot.write(self._table.index(row.id), ())
        self._count()
        # What drafted for other rows has nothing to go on with.
        self.companion = None
        return joined

    def _count(self) -> None:
        """Copy the lengths from the table, after rows changed."""
        lengths = [row.length for row in self._table]
        self._longest = max(lengths, default=0)
        if not lengths or min(lengths) == self._longest:
            self._lengths = self._longest
        else:
            self._lengths = torch.tensor(lengths, dtype=torch.long, device="cpu")

    def _counted(self) -> None:
        """Copy the lengths to the table, after a forward or a crop."""
        for row, length in zip(self._table, self.lengths(len(self._table)).tolist(), strict=True):
            row.length, row.torn = length, False

    def _look_for_torn(self) -> None:
        """Mark the rows of a forward that failed after recurrent layers had begun."""
        if self._forward_unfinished:
            for row in self._table:
                row.torn |= row.taking > 0
            self._forward_unfinished = False

    def _write(self, row: Row, contents: Sequence[RowContent]) -> None:
        if contents:
            self._kept.write(self._table.index(row.id), contents)
            row.length = contents[-1].stop
            row.adapters = contents[-1].adapters
            row.finite = max(row.finite, row.length)
        self._count()
