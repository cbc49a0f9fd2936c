"""What a cache asks of what a layer keeps, whatever that is."""

from typing import Protocol

import torch
from torch import Tensor

from quintet.cache.recurrent import Inputs
from quintet.cache.segment import Segment
from quintet.ops.mamba2 import MixerWeights


class CacheSlot(Protocol):
    """What one layer keeps between steps, whatever that is."""

    def select(self, rows: Tensor) -> None:
        """Keep the given rows (N,) of the batch, in that order, each as often as it is named."""
        ...

    def crop(self, lengths: int | Tensor) -> None:
        """Forget what is behind the given length, of all rows or of each."""
        ...

    def snapshot(self, lengths: int | Tensor) -> None:
        """Prepare to be cropped to any point from here on, where that takes preparation."""
        ...

    def reset(self) -> None:
        """Forget everything; preallocated memory stays."""
        ...

    @property
    def batch_size(self) -> int | None:
        """The number of rows, None while nothing is stored."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes held, preallocated ones included."""
        ...


class AttentionSlot(CacheSlot, Protocol):
    """A slot of keys and values."""

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """Store a segment's (B, K, T, D) and return all (B, K, S, D) its rows have to attend to."""
        ...

    def content(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values, (B, K, length, D) each."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """What numbers are kept in, None while nothing is stored or where it is no matter."""
        ...

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return the buffers of all rows, with room for what the caller writes; None without."""
        ...


class StateSlot(CacheSlot, Protocol):
    """A slot of a recurrent state and the last inputs of a convolution."""

    @property
    def window(self) -> Tensor | None:
        """The last inputs (B, W - 1, C); None while nothing is stored."""
        ...

    @property
    def remembers(self) -> bool:
        """Whether `remember` has to be told the inputs of an update."""
        ...

    def remember(self, inputs: Inputs) -> None:
        """Keep what an update came from."""
        ...

    def record(self, weights: MixerWeights) -> Tensor:
        """Return memory for a kernel to leave what it projects, instead of `remember`."""
        ...

    def advance(self, segment: Segment) -> None:
        """Keep what a kernel has recorded of the tokens that were counted."""
        ...

    def content(self) -> tuple[Tensor, Tensor] | None:
        """Return window and state, which a caller may overwrite; None of none."""
        ...

    def buffers(self) -> tuple[Tensor, Tensor] | None:
        """Return both, of all rows, for a caller to change instead of `update`; None where not."""
        ...

    def update(self, window: Tensor, state: Tensor, segment: Segment) -> None:
        """Replace both, of the segment's rows, by what they are after a forward."""
        ...


class Companion(Protocol):
    """What is kept beside a cache, of the same rows, and follows when they are selected."""

    def select(self, rows: Tensor) -> None:
        """Keep the given rows (N,) of the batch, in that order, each as often as it is named."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        ...
