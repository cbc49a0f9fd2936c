"""Rows that hold several texts one after the other, none of which sees another.

What mixes tokens, attention and recurrent states, runs over one text at a time; all else runs over
the row as it is. No mask of all pairs is made, and no padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.ops.masks import Visibility, causal_mask, visibility
from quintet.ops.transforms import recorded

__all__ = ["Attend", "Documents", "documents_of"]

# Of a visibility, queries (B, H, T, ...), keys and what else there is of each token.
Attend = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Documents:
    """Which texts the rows of a batch hold.

    Attributes:
        index: (B, T), the number of each token's text in its row.
        pieces: row, first column and the one behind the last, of each text in order; None in a
            program that is recorded for any texts.
    """

    index: Tensor
    pieces: tuple[tuple[int, int, int], ...] | None

    def positions(self) -> Tensor:
        """Return (B, T), each token's place in its text."""
        columns = torch.arange(self.index.shape[1], dtype=torch.long, device=self.index.device)
        starts = torch.where(self.apart(1), columns, 0)
        return columns - starts.cummax(dim=1).values

    def apart(self, k: int) -> Tensor:
        """Return (B, T), True where the token k places before is of another text, or none."""
        before = F.pad(self.index, (k, 0), value=-1)[:, : self.index.shape[1]]
        return before != self.index

    def ahead(self, x: Tensor, k: int) -> Tensor:
        """Return for each token what (B, T, C) has k places later in its text, zeros behind it."""
        T = x.shape[1]
        later = F.pad(x[:, k:], (0, 0, 0, min(k, T)))
        index = F.pad(self.index[:, k:], (0, min(k, T)), value=-1)
        return later.masked_fill((index != self.index)[..., None], 0)

    def each(self, of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return what a function makes of each text of (B, T, ...), in the columns of that."""
        assert self.pieces is not None
        made = [of(x[row : row + 1, start:end]) for row, start, end in self.pieces]
        joined = torch.cat(made, dim=1)
        return joined.view(*x.shape[:2], *joined.shape[2:])

    def attention(self, attend: Attend) -> Attend:
        """Return what attends within each text, of what attends in rows (B, H, T, ...)."""
        pieces = self.pieces
        if pieces is None:
            return attend

        def within(seen: Visibility, q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor | None]:
            B, H, T, _ = q.shape
            outs, maps = [], []
            for row, start, end in pieces:
                own = (x[row : row + 1, :, start:end] for x in (q, *others))
                out, weights = attend(_within(end - start, seen.window, q.device), *own)
                outs.append(out)
                if weights is not None:
                    maps.append(F.pad(weights, (start, T - end)))

            def joined(made: list[Tensor]) -> Tensor:
                return torch.cat(made, dim=2).view(H, B, T, -1).transpose(0, 1)

            return joined(outs), joined(maps) if maps else None

        return within

    def masked(self, seen: Visibility, slots: Tensor) -> Visibility:
        """Return a visibility with a mask that separates the texts, for a recorded program."""
        T = self.index.shape[1]
        same = self.index[:, None, :, None] == self.index[:, None, None]
        mask = causal_mask(slots, T, seen.window) & same
        return Visibility(mask, False, seen.start, seen.window, custom=True)


def documents_of(index: Tensor) -> Documents | None:
    """Return the texts of rows (B, T) of numbers, a text ending where they change.

    None where every row is one text.
    """
    starts = index.diff(dim=1) != 0
    number = F.pad(starts.cumsum(dim=1), (1, 0))
    if recorded():
        return Documents(number, None)
    if not bool(starts.any()):
        return None
    T = index.shape[1]
    pieces = []
    for row, borders in enumerate(starts.tolist()):
        edges = [0, *(column + 1 for column, border in enumerate(borders) if border), T]
        pieces += [(row, *edge) for edge in pairwise(edges)]
    return Documents(number, tuple(pieces))


def _within(length: int, window: int | None, device: torch.device) -> Visibility:
    slots = torch.arange(length, dtype=torch.long, device=device)[None]
    return visibility(slots, 0, length, window)
