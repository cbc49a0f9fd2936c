"""The rows that sequences have in an engine, and the forward over some of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quintet.cache import Cache

__all__ = ["Cached", "Piece", "Rows"]


class Cached(Protocol):
    """What rows need of a model: a forward that continues from a cache."""

    @property
    def device(self) -> torch.device:
        """Where it takes ids."""
        ...

    def new_cache(self) -> Cache:
        """Return an empty cache of the kind the model grows."""
        ...

    def __call__(
        self,
        input_ids: Tensor,
        *,
        past_key_values: Cache,
        use_cache: bool,
        logits_to_keep: int,
        return_dict: bool,
    ) -> Any:
        """Return an output with `logits` (B, logits_to_keep, V)."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """What one row is given in a forward.

    Attributes:
        row: which one.
        ids: the tokens that follow what the row holds.
        keep: of how many of the last of them logits are needed.
    """

    row: int
    ids: list[int]
    keep: int


class Rows:
    """Rows of memory for as many sequences as may be under way at once.

    Args:
        model: what runs.
        count: how many rows there are.
    """

    def __init__(self, model: Cached, count: int) -> None:
        self.model = model
        self._caches: dict[int, Cache] = {}
        self._free = list(range(count))[::-1]

    def open(self) -> int | None:
        """Return an empty row; None where all are taken."""
        if not self._free:
            return None
        row = self._free.pop()
        self._caches[row] = cache = self.model.new_cache()
        cache.keeps_layers = True
        return row

    def close(self, row: int) -> None:
        """Give a row back."""
        del self._caches[row]
        self._free.append(row)

    def rewind(self, row: int, length: int) -> int:
        """Take a row back to a length, or to the nearest one before that it can go back to."""
        cache = self._caches[row]
        if length and not cache.states:
            cache.crop(length)
            return length
        cache.reset()
        return 0

    @property
    def nbytes(self) -> int:
        """The bytes that are held."""
        return sum(cache.nbytes for cache in self._caches.values())

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Run over the pieces in one forward, and return the logits (N, V) that are kept of each.

        Where this raises, the rows of the pieces hold what they held, or have to be cleared.
        """
        made = []
        for piece in pieces:
            ids = torch.tensor([piece.ids], dtype=torch.long, device=self.model.device)
            output = self.model(
                ids,
                past_key_values=self._caches[piece.row],
                use_cache=True,
                logits_to_keep=max(piece.keep, 1),
                return_dict=True,
            )
            made.append(output.logits[0, output.logits.shape[1] - piece.keep :])
        return torch.cat(made)
