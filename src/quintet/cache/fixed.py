"""A pool's first rows as a step of fixed shapes sees them, for recording.

How long rows are, and which of them take a token, are numbers in tensors that are changed in place.
So a step that was recorded once, as a program or as a graph of a device, serves all that follow.
"""

import torch
from torch import Tensor

from quintet.cache.base import Cache
from quintet.cache.pool import PooledCache
from quintet.cache.recurrent import Inputs
from quintet.cache.row_memory import DenseRows, TokenRows
from quintet.cache.segment import Segment
from quintet.cache.state_rows import StateRows
from quintet.errors import InputError
from quintet.kernels.ssm import MixerWeights
from quintet.triton.pages import Pages


class FixedRows(Cache):
    """The first B rows of a pool's memory with S slots each, in use or not.

    A step gives every row one token. One that takes none loses nothing: what is written for it lies
    behind its end, where its next token goes, and its recurrent states stay. The pool is told
    beside (`PooledCache.begin_step`).

    Attributes:
        starts: (B,) how many tokens each row holds, less than S; changed in place before a step.
        counts: (B,) 1 for a row that takes its token, 0 for one that does not; likewise.

    Args:
        pool: whose memory was taken.
        starts: as above.
        counts: as above.
        width: S.
    """

    def __init__(self, pool: PooledCache, starts: Tensor, counts: Tensor, width: int) -> None:
        B = len(starts)
        super().__init__(
            [_Tokens(one, B, width) if isinstance(one, TokenRows) else None for one in pool.layers],
            [_States(one, B) if isinstance(one, StateRows) else None for one in pool.states],
        )
        self.starts, self.counts, self.width = starts, counts, width
        rows = torch.arange(B + 1, dtype=torch.int32, device=starts.device)
        self._table, self._ends = rows[:B, None], rows

    @staticmethod
    def can_be(pool: PooledCache) -> bool:
        """Return whether the pool's memory is allocated, on one device, and contiguous by rows."""
        slots = [slot for slot in (*pool.layers, *pool.states) if slot is not None]
        buffers = [slot.tensors for slot in slots if isinstance(slot, TokenRows | StateRows)]
        allocated = len(buffers) == len(slots) and all(buffers)
        return allocated and len({x.device for tensors in buffers for x in tensors}) == 1

    def segment(
        self, batch: int, length: int, device: torch.device, counts: Tensor | None
    ) -> Segment:
        """Return the slot of each row's next token.

        Raises:
            InputError: other rows than these are given, or more tokens than one.
        """
        if batch != len(self.starts) or length != 1 or counts is not None:
            raise InputError(
                f"a step of fixed shapes gives {len(self.starts)} rows one token each, not "
                f"{length} to {batch}; go on with the pool itself"
            )
        taken = self.counts if self.states else None
        pages = Pages(self._table, self.starts.int(), self._ends, 1, self.width)
        return Segment(self.starts, 1, self.width, taken, device, pages=pages)

    def memory(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Return a layer's rows of S slots, each a page; None of codes."""
        slot = self.layers[layer_idx]
        return slot.plain if isinstance(slot, _Tokens) else None

    def advance(self, segment: Segment) -> None:
        """Do nothing: the caller changes `starts`."""

    @property
    def batch_size(self) -> int | None:
        return len(self.starts)


class _Slot:
    """Base of the slots of fixed rows; only a step's tokens change."""

    tensors: tuple[Tensor, ...]

    @property
    def batch_size(self) -> int | None:
        """B."""
        return len(self.tensors[0])

    @property
    def nbytes(self) -> int:
        """0: the memory belongs to the pool."""
        return 0

    def select(self, rows: Tensor) -> None:
        """Raise InputError: only the pool reorders, crops and resets rows."""
        raise InputError("fixed rows are a view of a pool for one step; change the pool itself")

    def crop(self, lengths: int | Tensor) -> None:
        """Raise InputError, as `select` does."""
        self.select(self.tensors[0])

    def snapshot(self, lengths: int | Tensor) -> None:
        """Raise InputError, as `select` does."""
        self.select(self.tensors[0])

    def reset(self) -> None:
        """Raise InputError, as `select` does."""
        self.select(self.tensors[0])


class _Tokens(_Slot):
    """An `AttentionSlot` over a pool's first rows."""

    def __init__(self, memory: TokenRows, rows: int, width: int) -> None:
        self.memory = memory
        self.tensors = tuple(x[:rows, :, :width] for x in memory.tensors)

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """Store one token per row; return all (B, K, S, D) they attend to."""
        new = self.memory.encoded(keys, values)
        for buffer, x in zip(self.tensors, new, strict=True):
            buffer.scatter_(2, segment.slots()[:, None, :, None].expand_as(x), x)
        return self.memory.decoded(self.tensors)

    @property
    def plain(self) -> tuple[Tensor, Tensor] | None:
        """The keys and values, if they are stored as they are; else None."""
        if not isinstance(self.memory, DenseRows):
            return None
        keys, values = self.tensors
        return keys, values

    def content(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values."""
        return self.memory.decoded([x[:, :, :length] for x in self.tensors])

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return None: only `update` writes."""
        return None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the numbers, or None if any will do."""
        return self.memory.dtype


class _States(_Slot):
    """A `StateSlot` over a pool's first rows."""

    remembers = False

    def __init__(self, memory: StateRows, rows: int) -> None:
        window, state = (x[:rows] for x in memory.tensors)
        self.window: Tensor | None = window
        self.tensors = self._pair = window, state

    def content(self) -> tuple[Tensor, Tensor] | None:
        """Return window and state; the caller may overwrite them."""
        return self._pair

    def update(self, window: Tensor, state: Tensor, segment: Segment) -> None:
        """Store window and state after the step."""
        for buffer, new in zip(self.tensors, (window, state), strict=True):
            if new is not buffer:
                buffer.copy_(new)

    def buffers(self) -> tuple[Tensor, Tensor] | None:
        """Return None: only `update` writes."""
        return None

    def remember(self, inputs: Inputs) -> None:
        """Raise InputError: only the pool can go back."""
        self.select(inputs.raw)

    def record(self, weights: MixerWeights) -> Tensor:
        """Raise InputError, as `remember` does."""
        raise InputError("fixed rows keep nothing to go back by; step with the pool itself")

    def advance(self, segment: Segment) -> None:
        """Do nothing: nothing was recorded."""
