"""Low-rank additions of several adapters beside each other, for few vectors of a mixed batch.

With the additions of all adapters stacked, A (N, I) and B (O, N) for ranks of N together, and k the
adapter of a vector x:

    y + Σ_j s_j · B_j (A_j x) · [j = k]  =  y + B ([owner = k] · A x),

two products for any number of adapters. Beyond `FEW` vectors, what is computed for nothing costs
more than a product for each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.adapters.lowrank import LowRank

FEW = 64


class AdapterShare(NamedTuple):
    """An adapter's addition to a map.

    Attributes:
        number: by which a vector says that it is of this adapter.
        addition: the adapter's.
        weight: what it is multiplied by.
    """

    number: int
    addition: LowRank
    weight: float


class StackedLowRank(NamedTuple):
    """The additions of several adapters to one map.

    Attributes:
        A: (N, I).
        B: (O, N), scaled.
        owner: (N,) the number of the adapter that each of N is of.
    """

    A: Tensor
    B: Tensor
    owner: Tensor

    @classmethod
    def of(cls, shares: Sequence[AdapterShare]) -> "StackedLowRank":
        """Stack additions that are low-rank and nothing else."""
        with torch.no_grad():
            A = torch.cat([one.addition.lora_A for one in shares])
            B = [one.addition.lora_B * (one.addition.scale * one.weight) for one in shares]
            owner = [one.number for one in shares for _ in range(one.addition.rank)]
            device = A.device
            return cls(A, torch.cat(B, dim=1), torch.tensor(owner, device=device, dtype=torch.long))

    def added(self, x: Tensor, y: Tensor, which: Tensor) -> Tensor:
        """Return y (..., O) plus the additions of adapters `which` (...) for x (..., I)."""
        low = F.linear(x.to(self.A.dtype), self.A) * (which[..., None] == self.owner)
        return (y + F.linear(low, self.B)).to(y.dtype)
