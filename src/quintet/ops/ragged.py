"""Ragged batches: padding is moved behind each row's tokens, or left out.

A mask may put padding anywhere. Packed, a row starts at its first real token, so that a token's
place in its row is its slot in the cache, and no real token can see padding behind it.
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.ops.transforms import batched, recorded

# No row is as long, and lengths added to it fit a tensor of integers.
LONGEST = 2**62


@dataclass(frozen=True, slots=True)
class Ragged:
    """The mapping between the columns of a padded batch and packed rows.

    Attributes:
        counts: (B,) the real tokens of each row.
        order: (B, T) the column that each packed place takes.
        places: (B, T) the packed place of each column, the inverse of `order`.
    """

    counts: Tensor
    order: Tensor
    places: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """Move padding behind the tokens: (B, T, ...) in columns -> (B, T, ...) packed."""
        return _take(x, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """Put packed rows back into their columns."""
        return _take(x, self.places)

    def unpack_rows(self, x: Tensor) -> Tensor:
        """Put packed rows back into their columns."""
        return self.unpack(x)


@dataclass(frozen=True, slots=True)
class Unpadded:
    """The places of a padded batch that are tokens.

    Attributes:
        lengths: how many tokens each row has.
        index: (N,), the places of all tokens, counted over all rows.
        shape: (B, T), that of the batch.
    """

    lengths: tuple[int, ...]
    index: Tensor
    shape: tuple[int, int]

    def pack(self, x: Tensor) -> Tensor:
        """Select the tokens of (B, T, ...), (1, N, ...)."""
        return x.flatten(0, 1)[self.index.to(x.device)][None]

    def unpack(self, x: Tensor) -> Tensor:
        """Scatter (1, N, ...) to (B, T, ...), zeros for padding."""
        B, T = self.shape
        whole = x.new_zeros(B * T, *x.shape[2:])
        return torch.unflatten(whole.index_copy(0, self.index.to(x.device), x[0]), 0, (B, T))

    def unpack_rows(self, x: Tensor) -> Tensor:
        """Move rows (B, t, ...) that start with their tokens to their columns."""
        steps = torch.arange(x.shape[1], dtype=torch.long, device=x.device)
        lengths = torch.tensor(self.lengths, dtype=torch.long, device=x.device)
        return self.unpack(x[steps < lengths[:, None]][None])


Padding = Ragged | Unpadded


def check_ones_and_zeros(mask: Tensor) -> None:
    """Check that a mask consists of ones and zeros: an additive one would mean the opposite.

    Raises:
        InputError: it holds something else. In a program that is recorded nothing is looked at.
    """
    if mask.dtype == torch.bool or mask.is_meta or recorded() or batched():
        return
    other = (mask != 0) & (mask != 1)
    if bool(other.any()):
        raise InputError(
            f"attention_mask holds {mask[other][0].item()}; it has to be 1 for tokens and 0 for "
            "padding, or for what a query does not see"
        )


def padding_of(mask: Tensor) -> Padding | None:
    """Read a padding mask (B, T); None without padding.

    A program that is recorded serves any mask of a shape, so it computes the padding too.
    """
    real = mask.to(torch.bool)
    if recorded() or batched():
        return ragged(mask)
    index = real.flatten().nonzero().flatten()
    if len(index) == real.numel():
        return None
    if not len(index):
        return ragged(mask)
    return Unpadded(tuple(real.sum(dim=1).tolist()), index, (real.shape[0], real.shape[1]))


def ragged(mask: Tensor) -> Ragged | None:
    """Read a padding mask (B, T); None without padding."""
    real = mask.to(torch.bool)
    if not (recorded() or batched()) and bool(real.all()):
        return None
    T = mask.shape[1]
    places = torch.arange(T, dtype=torch.long, device=mask.device)
    # Numbers of their own, as exporters know no stable sort.
    order = torch.argsort(places + T * ~real, dim=1)
    return Ragged(real.sum(dim=1), order, torch.argsort(order, dim=1))


def keys_in_columns(weights: Tensor, mask: Tensor) -> Tensor:
    """Move attention weights (B, H, T, S) from slots to the columns of a mask (B, W)."""
    real = mask.to(torch.bool)
    slots = (real.cumsum(dim=1) - 1).clamp(min=0, max=weights.shape[-1] - 1)
    index = slots[:, None, None].expand(*weights.shape[:3], -1)
    return weights.gather(-1, index) * real[:, None, None]


def _take(x: Tensor, index: Tensor) -> Tensor:
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    # With layers on several devices, what is moved is not always where the mask is.
    return x.gather(1, index.to(x.device))


def whole_length(length: object) -> int:
    """Return a length that fits a tensor of integers; beyond that it is longer than any row.

    Raises:
        InputError: it is no whole number.
    """
    try:
        number = operator.index(length)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(
            f"max_length={shown(length)} has to be a whole number, or a tensor of one for each row"
        ) from None
    return max(-LONGEST, min(number, LONGEST))
