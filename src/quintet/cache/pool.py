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

from quintet.cache.base import check_adapters
from quintet.cache.dense import _slots
from quintet.cache.kept import Kept
from quintet.cache.memories import RowMemories
from quintet.cache.pool_rows import PoolRows
from quintet.cache.row_memory import CodeRows, DenseRows, RowMemory
from quintet.cache.rows import Row, RowTable, whole_blocks
from quintet.cache.segment import Segment
from quintet.cache.state_rows import StateRows
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import ContextLengthError, InputError
from quintet.ops.transforms import recorded, transformed
from quintet.ops.vector_codes import VectorCode


class PooledCache(PoolRows):
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
        self._memories = memories = RowMemories()

        def attention() -> RowMemory:
            memories.tokens.append(make(table, capacity))
            return memories.tokens[-1]

        def recurrent() -> StateRows:
            memories.states.append(StateRows(table))
            return memories.states[-1]

        super().__init__(*_slots(config, attention, recurrent))

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
            longest_row = ends.index(needed)
            raise ContextLengthError(
                f"the pool has room for capacity={self.capacity} tokens a row, row {longest_row} "
                f"holds {rows[longest_row].length} and was given {taken[longest_row]} more; make a "
                "larger one"
            )
        if not len(self._table):
            self._join(batch)
        for row, tokens in zip(self._table, taken, strict=True):
            row.taking = tokens
        self._memories.clear(self._table, ends, whole_blocks(needed, self.capacity))
        pages = self._table.pages(device) if counts is not None else None
        known = tuple(row.length for row in self._table)
        return replace(whole, keys=needed, pages=pages, known=known)

    def memory(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Return a layer's rows, each a page; None of codes, and before the first forward."""
        return slot.pair() if isinstance(slot := self.layers[layer_idx], DenseRows) else None

    def record_adapters(self, adapters: tuple[Hashable, ...]) -> None:
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
        # The device knows it, too, but would have to be asked.
        self._finish(segment)
        for row in self._table:
            row.length += row.taking
            row.taking, row.torn = 0, False
            row.finite = max(row.finite, whole_blocks(segment.keys, self.capacity))
        self._count()

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
        self._memories.clear(self._table, [0] * len(self._table), slots)
        for index, row in enumerate(self._table):
            row.taking = int(index in indices)
            row.finite = max(row.finite, slots)
        self._forward_unfinished = bool(self._memories.states)

    def end_step(self) -> None:
        """Count the tokens announced by `begin_step`."""
        self._forward_unfinished = False
        for slot in self._memories.states:
            slot.stepped()
        for row in self._table:
            row.length += row.taking
            row.taking = 0
        self._count()

    @property
    def batch_size(self) -> int | None:
        return len(self._table) or None

    def get_max_cache_shape(self) -> int | None:
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
            self._memories.share(row, copy)
        for row in set(before).difference(self._table):
            self._memories.drop(row)
        for index, row in enumerate(self._table):
            if index >= len(before) or before[index] is not row:
                row.finite = row.length
        self._count()

    def reset(self) -> None:
        super().reset()
        self._table.clear()

    def _counted(self) -> None:
        """Copy the lengths to the table, after a forward or a crop."""
        for row, length in zip(self._table, self.lengths(len(self._table)).tolist(), strict=True):
            row.length, row.torn = length, False
