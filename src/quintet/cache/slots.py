"""The interface between a cache and the slots of its layers."""

from typing import Protocol

import torch
from torch import Tensor

from quintet.cache.recurrent import Inputs
from quintet.cache.segment import Segment
from quintet.kernels.ssm import MixerWeights


class CacheSlot(Protocol):
    """The memory of one layer between forwards."""

    def select(self, rows: Tensor) -> None:
        """Keep the rows (N,), in that order; rows may repeat."""
        ...

    def crop(self, lengths: int | Tensor) -> None:
        """Drop the tokens behind a length, of all rows or of each."""
        ...

    def snapshot(self, lengths: int | Tensor) -> None:
        """Prepare for `crop` to any point from here on."""
        ...

    def reset(self) -> None:
        """Empty the slot; preallocated memory stays."""
        ...

    @property
    def batch_size(self) -> int | None:
        """The number of rows, or None while empty."""
        ...

    @property
    def nbytes(self) -> int:
        """The allocated bytes."""
        ...


class AttentionSlot(CacheSlot, Protocol):
    """A slot of keys and values."""

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """Store a segment's (B, K, T, D); return all (B, K, S, D) its rows attend to."""
        ...

    def content(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values, (B, K, length, D) each."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the numbers, or None while empty or if any will do."""
        ...

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return the buffers of all rows, with space for the new tokens, or None."""
        ...


class StateSlot(CacheSlot, Protocol):
    """A slot of a recurrent state and a convolution's last inputs."""

    @property
    def window(self) -> Tensor | None:
        """The last inputs (B, W - 1, C), or None while empty."""
        ...

    @property
    def remembers(self) -> bool:
        """Whether `remember` needs the inputs of an update."""
        ...

    def remember(self, inputs: Inputs) -> None:
        """Keep the inputs of an update."""
        ...

    def record(self, weights: MixerWeights) -> Tensor:
        """Return memory in which a kernel records its projections, instead of `remember`."""
        ...

    def advance(self, segment: Segment) -> None:
        """Keep a kernel's recording of the counted tokens."""
        ...

    def content(self) -> tuple[Tensor, Tensor] | None:
        """Return window and state, or None; the caller may overwrite them."""
        ...

    def buffers(self) -> tuple[Tensor, Tensor] | None:
        """Return window and state of all rows to update in place, or None."""
        ...

    def update(self, window: Tensor, state: Tensor, segment: Segment) -> None:
        """Store window and state of the segment's rows after a forward."""
        ...


class Companion(Protocol):
    """An object kept beside a cache for the same rows, selected along with them."""

    def select(self, rows: Tensor) -> None:
        """Keep the rows (N,), in that order; rows may repeat."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        ...
