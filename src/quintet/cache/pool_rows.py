"""The rows of a pool: how they join, leave, are copied and go back."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from quintet.cache.base import Cache, check_adapters
from quintet.cache.content import RowContent
from quintet.cache.memories import RowMemories
from quintet.cache.rows import Row, RowTable
from quintet.errors import InputError


class PoolRows(Cache):
    """A cache whose rows join, leave, fork and go back one by one."""

    capacity: int
    _table: RowTable
    _memories: RowMemories

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
        self._memories.check(0, contents, self.capacity)
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
        self._memories.check(own.length, contents, self.capacity)
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
        return replace(self._memories.read(index, start, stop), adapters=own.adapters)

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
            self._memories.copy(index, self._table.index(copy.id))
            self._memories.share(own, copy)
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
        self._memories.drop(own)
        if index != last:
            self._memories.copy(last, index)
            # What lies behind is of the row that left.
            self._table[last].finite = self._table[last].length
        self._table.leave(index)
        self._count()
        self.companion = None

    def bytes_of_rows(self) -> tuple[int, int]:
        """Return the bytes of a row without tokens, and of each token.

        Nothing is taken before the first forward.
        """
        return self._memories.bytes_of_rows(self._table.size, self.capacity)

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
        for slot in self._memories.states:
            slot.take(index)
        return own.length

    def snapshots(self, row: int) -> list[int]:
        """Return the lengths at which a row has snapshots."""
        index, states = self._table.index(row), self._memories.states
        return sorted(states[0].taken(index)) if states else []

    def drop_snapshots(self, row: int, *lengths: int) -> None:
        """Drop a row's snapshots at some lengths, or all."""
        self._memories.drop(self._row(row), lengths or None)

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
        reached = self._memories.reach(index, length)
        for slot in self._memories.states:
            slot.back(index, reached)
        own.length, own.torn = reached, False
        self._count()
        return reached

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
            for slot in self._memories.states:
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

    def _look_for_torn(self) -> None:
        """Mark the rows of a forward that failed after recurrent layers had begun."""
        if self._forward_unfinished:
            for row in self._table:
                row.torn |= row.taking > 0
            self._forward_unfinished = False

    def _write(self, row: Row, contents: Sequence[RowContent]) -> None:
        if contents:
            self._memories.write(self._table.index(row.id), contents)
            row.length = contents[-1].stop
            row.adapters = contents[-1].adapters
            row.finite = max(row.finite, row.length)
        self._count()
