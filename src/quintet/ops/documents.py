"""Rows that hold several texts one after the other, none of which sees another."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.ops.masks import AttentionMask, causal_mask
from quintet.ops.transforms import recorded


@dataclass(frozen=True, slots=True)
class Documents:
    """Which texts the rows of a batch hold.

    Attributes:
        index: (B, T), the number of each token's text in its row.
        lengths: how many tokens each text of all rows has, in order; None in a program that is
            recorded for any texts.
    """

    index: Tensor
    lengths: tuple[int, ...] | None

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

    def masked(self, mask: AttentionMask, slots: Tensor) -> AttentionMask:
        """Return a mask whose entries separate the texts, for a recorded program."""
        T = self.index.shape[1]
        same = self.index[:, None, :, None] == self.index[:, None, None]
        entries = causal_mask(slots, T, mask.window) & same
        return AttentionMask(entries, False, mask.start, mask.window, custom=True)

    def in_columns(self, weights: Tensor) -> Tensor:
        """Return weights (n, H, t, s) of n texts where their rows have them, (B, H, T, T)."""
        assert self.lengths is not None
        B, T = self.index.shape
        blocks, column = [], 0
        for own, length in zip(weights, self.lengths, strict=True):
            blocks.append(F.pad(own[:, :length, :length], (column, T - column - length)))
            column = (column + length) % T
        return torch.unflatten(torch.cat(blocks, dim=1), 1, (B, T)).transpose(0, 1)


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
    firsts = F.pad(starts, (1, 0), value=True).flatten().nonzero().flatten()
    ends = F.pad(firsts[1:], (0, 1), value=index.numel())
    return Documents(number, tuple((ends - firsts).tolist()))
