"""The table of a pool's rows: which sequence has which row of the memory."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from quintet.errors import InputError
from quintet.ops.paged import attend_pages
from quintet.ops.sending import sent
from quintet.triton.pages import Pages

BLOCK = 64


def whole_blocks(slots: int, capacity: int) -> int:
    """Round a number of slots up to whole blocks, at most the capacity."""
    return min(-(-slots // BLOCK) * BLOCK, capacity)


@dataclass(slots=True, eq=False)
class Row:
    """One sequence's row.

    Attributes:
        id: what the row is called; no other row of the pool ever has the same.
        length: how many tokens it holds.
        finite: up to which slot its memory holds numbers; behind that it may hold anything.
        taking: how many tokens the forward brings that runs now.
        adapters: what is known of the adapters its tokens were made with; None for nothing.
        torn: whether a forward that failed may have left its states ahead of its length.
    """

    id: int
    length: int = 0
    finite: int = 0
    taking: int = 0
    adapters: Hashable = None
    torn: bool = False


class RowTable:
    """The rows in use, which are the first ones of the memory, without gaps.

    Args:
        size: R, how many rows the memory has.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: list[Row] = []
        self._indices: dict[int, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def index(self, row: int) -> int:
        """Return a row's index in the memory.

        Raises:
            InputError: no row in use has this id.
        """
        found = self._indices.get(row)
        if found is None:
            raise InputError(
                f"the pool has no row {row!r}; in use are {list(self._indices)}, and a row that "
                "was freed is gone"
            )
        return found

    def pages(self, device: torch.device) -> Pages | None:
        """Return the pages of the rows that take tokens; None if no backend asks.

        All of it is known to the host, which sends it and does not wait.
        """
        if not attend_pages.order:
            return None
        lengths, taken = ([row.length for row in self], [row.taking for row in self])
        rows, starts, ends = (
            sent(x, torch.int32, device)
            for x in (range(len(self)), lengths, [*accumulate(taken, initial=0)])
        )
        longest = max(map(sum, zip(lengths, taken, strict=True)))
        return Pages(rows[:, None], starts, ends, max(taken), longest)

    def check_free(self, rows: int) -> None:
        """Check that this many rows are free.

        Raises:
            InputError: there are fewer.
        """
        if len(self) + rows > self.size:
            raise InputError(
                f"the pool has {self.size} rows, {len(self)} are in use and {rows} more are asked "
                "for; free some, or make a larger pool"
            )

    def join(self, rows: int) -> list[Row]:
        """Take the next free rows into use."""
        self.check_free(rows)
        joined = [self._new() for _ in range(rows)]
        self._set([*self._rows, *joined])
        return joined

    def leave(self, index: int) -> None:
        """Free a row; the last one moves into its place."""
        rows = self._rows
        rows[index] = rows[-1]
        self._set(rows[:-1])

    def select(self, indices: Sequence[int]) -> list[tuple[Row, Row]]:
        """Keep the rows at some indices, in that order; repeated ones get new ids.

        Returns:
            Each row that is new and the one that it is a copy of.
        """
        selected: list[Row] = []
        copies = []
        for row in (self._rows[index] for index in indices):
            own = row
            if any(row is other for other in selected):
                own = self._new()
                own.length, own.torn, own.adapters = row.length, row.torn, row.adapters
                copies.append((own, row))
            selected.append(own)
        self._set(selected)
        return copies

    def clear(self) -> None:
        """Free all rows."""
        self._set([])

    def _new(self) -> Row:
        self._next += 1
        return Row(self._next - 1)

    def _set(self, rows: list[Row]) -> None:
        self._rows = rows
        self._indices = {row.id: index for index, row in enumerate(rows)}
