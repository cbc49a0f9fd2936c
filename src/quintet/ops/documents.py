"""Packed rows: several texts in one row that do not see each other."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.ops.masks import AttentionMask, causal_mask
from quintet.ops.transforms import recorded


@dataclass(frozen=True, slots=True)
class Documents:
    """The texts packed into the rows of a batch.

    Attributes:
        index: (B, T), the number of each token's text in its row.
        lengths: how many tokens each text of all rows has, in order; None in a program that is
            recorded for any texts.
    """

    index: Tensor
    lengths: tuple[int, ...] | None

    def positions(self) -> Tensor:
        """Return each token's position in its text, (B, T)."""
        columns = torch.arange(self.index.shape[1], dtype=torch.long, device=self.index.device)
        starts = torch.where(self.apart(1), columns, 0)
        return columns - starts.cummax(dim=1).values

    def apart(self, k: int) -> Tensor:
        """Return (B, T), True where the token k places earlier belongs to another text."""
        before = F.pad(self.index, (k, 0), value=-1)[:, : self.index.shape[1]]
        return before != self.index

    def ahead(self, x: Tensor, k: int) -> Tensor:
        """Shift (B, T, C) by k within each text, zeros at its end."""
        T = x.shape[1]
        later = F.pad(x[:, k:], (0, 0, 0, min(k, T)))
        index = F.pad(self.index[:, k:], (0, min(k, T)), value=-1)
        return later.masked_fill((index != self.index)[..., None], 0)

    def masked(self, mask: AttentionMask, slots: Tensor) -> AttentionMask:
        """Return a mask that separates the texts, for a recorded program."""
        T = self.index.shape[1]
        same = self.index[:, None, :, None] == self.index[:, None, None]
        entries = causal_mask(slots, T, mask.window) & same
        return AttentionMask(entries, False, mask.start, mask.window, custom=True)

    def in_columns(self, weights: Tensor) -> Tensor:
        """Return weights (n, H, t, s) of n texts in their rows, (B, H, T, T)."""
        assert self.lengths is not None
        B, T = self.index.shape
        blocks, column = [], 0
        for own, length in zip(weights, self.lengths, strict=True):
            blocks.append(F.pad(own[:, :length, :length], (column, T - column - length)))
            column = (column + length) % T
        return torch.unflatten(torch.cat(blocks, dim=1), 1, (B, T)).transpose(0, 1)


def documents_of(index: Tensor) -> Documents | None:
    """Return the texts of rows, given numbers (B, T) that change where a text ends.

    None if every row is one text.
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
