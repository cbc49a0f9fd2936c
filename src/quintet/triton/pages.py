"""Paged memory of sequences, as kernels see it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Coded(NamedTuple):
    """Memory in few bits: bytes (P, K, page, D·bits/8) and a scale (P, K, page, 1) a vector."""

    codes: Tensor
    scales: Tensor
    bits: int


Memory = Tensor | Coded


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """The pages of one forward's sequences, on the device.

    Attributes:
        table: (n, J) int32, the pages of each sequence, in the order of its slots; one below 0 is
            nowhere, as is what comes behind the last: none of it is seen. None if the keys are
            those of the packed row itself, (1, K, N, D), and each sequence begins there.
        starts: (n,) int32, the slot of each sequence's first token of this forward.
        ends: (n + 1,) int32, before which token of the packed row each sequence begins, and N: each
            token is of one. A sequence that fills a batch up is nowhere.
        most: how many tokens a sequence has at the most in this forward.
        longest: how many slots a sequence has at the most, with those of this forward.
    """

    table: Tensor | None
    starts: Tensor
    ends: Tensor
    most: int
    longest: int

    def of_tokens(self, N: int) -> tuple[Tensor, Tensor]:
        """Return the sequence of each of N tokens, n where it is of none, and its slot."""
        n, token = len(self.starts), torch.arange(N, dtype=torch.int32, device=self.ends.device)
        index = torch.searchsorted(self.ends[1:], token, right=True)
        own = index.clamp(max=n - 1)
        return index, (token - self.ends[own] + self.starts[own]).long()

    def place(self, sequence: Tensor, slot: Tensor, page: int) -> tuple[Tensor, Tensor]:
        """Return the page of slots, below 0 where that is nowhere, and which place there each is.

        Args:
            sequence: of each slot, the same shape.
            slot: of a sequence.
            page: how many slots one has.
        """
        if self.table is None:
            return torch.zeros_like(slot), self.ends[sequence] + slot
        J = self.table.shape[1]
        number = self.table[sequence, (slot // page).clamp(max=J - 1)].long()
        return torch.where(slot < J * page, number, -1), slot % page
