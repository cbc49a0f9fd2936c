"""Segments: the slots that the tokens of one forward take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from quintet.ops.sending import sent
from quintet.triton.pages import Pages


@dataclass(frozen=True, slots=True)
class Segment:
    """A rectangle: T tokens of each of several adjacent rows.

    Attributes:
        start: the slot of the first token; an int when all rows share it, otherwise (B,).
        length: T.
        keys: S, how many slots a layer has to attend to once the tokens are stored.
        counts: (B,) how many of the T are real, the rest being padding behind; None for all.
        device: where the tokens are.
        learns: whether a graph of autograd may hold on to all that is attended to.
        rows: of the cache, that are meant; None for all.
        tokens: of the packed row of a forward, that are meant; None for all.
        batch: how many rows the cache has; None for as many as are meant.
        longest: how many slots its longest row needs; None for `keys`.
        places: (B or 1, T) the slots of tokens that are not one after the other; None if they are.
        same: (B or 1, T, S) of these, which keys are of the token's text.
        known: the slot of each row's first token, where the host knows them; None if it would
            have to ask for `start`.
        pages: where the rows lie, as kernels that read lengths on the device are told; None where
            they lie otherwise.
    """

    start: int | Tensor
    length: int
    keys: int
    counts: Tensor | None
    device: torch.device
    learns: bool = False
    rows: slice | None = None
    tokens: slice | None = None
    batch: int | None = None
    longest: int | None = None
    places: Tensor | None = None
    same: Tensor | None = None
    known: tuple[int, ...] | None = None
    pages: Pages | None = None

    def slots(self) -> Tensor:
        """Return the slot of every token, (B or 1, T)."""
        if self.places is not None:
            return self.places
        steps = torch.arange(self.length, dtype=torch.long, device=self.device)
        if isinstance(self.start, int):
            return (steps + self.start)[None]
        return self.start[:, None] + steps

    def rows_of(self, x: Tensor) -> Tensor:
        """Return the segment's rows of a cached tensor, (rows, ...)."""
        return x if self.rows is None else x[self.rows]

    @property
    def capacity(self) -> int:
        """The number of slots that buffers need."""
        return self.keys if self.longest is None else self.longest

    def starts(self, rows: int) -> list[int]:
        """Return the first slot of each row."""
        if self.known is not None:
            return [*self.known]
        return [self.start] * rows if isinstance(self.start, int) else self.start.tolist()


def segments_of(whole: Segment, lengths: Sequence[int]) -> tuple[Segment, ...]:
    """Group rows into segments, given the number of tokens of each.

    Rows beside each other make one where they have equally many tokens and begin at the same slot,
    or have one token each. Rows without tokens are in none.

    Args:
        whole: of all rows, with the longest one's tokens for length.
        lengths: how many tokens each row has.
    """
    starts = whole.starts(len(lengths))

    def alike(row: int) -> tuple[int, int | None]:
        return lengths[row], None if lengths[row] == 1 else starts[row]

    segments, token = [], 0
    for (length, _), group in groupby(range(len(lengths)), key=alike):
        if not length:
            continue
        rows = list(group)
        first, last = rows[0], rows[-1] + 1
        own = starts[first:last]
        same = min(own) == max(own)
        end, keys = token + length * len(rows), max(own) + length
        segments.append(
            replace(
                whole,
                start=own[0] if same else sent(own, torch.long, whole.device),
                length=length,
                keys=keys,
                counts=None,
                rows=slice(first, last),
                tokens=slice(token, end),
                batch=len(lengths),
                longest=whole.keys,
                known=tuple(own),
                pages=_pages(whole.pages, slice(first, last), token, length, keys),
            )
        )
        token = end
    return tuple(segments)


def _pages(whole: Pages | None, rows: slice, token: int, length: int, longest: int) -> Pages | None:
    """Return the pages of some adjacent rows, the first of which has the first page.

    Args:
        whole: where all rows lie, a page each; None if that is not known.
        rows: which are meant.
        token: of the packed row, the first that is theirs.
        length: how many tokens each has.
        longest: how many slots they have at the most.
    """
    if whole is None or whole.table is None:
        return None
    ends = whole.ends[rows.start : rows.stop + 1] - token
    table = whole.table[: rows.stop - rows.start]
    return Pages(table, whole.starts[rows], ends, length, longest)
