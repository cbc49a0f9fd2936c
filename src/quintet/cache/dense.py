"""Unquantised keys and values: in growing or preallocated buffers."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.cache.base import Cache, _longest
from quintet.cache.memory import check_alike, locked, own, writable
from quintet.cache.recurrent import RecurrentSlot
from quintet.cache.segment import Segment
from quintet.cache.slots import AttentionSlot, StateSlot
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import ContextLengthError, InputError, named, shown

# As of a config.
MOST_LAYERS = 1_000
NO_WAY_BACK = "cache_position of a compiled step with recurrent layers has to be the next slot"


class _DenseSlot:
    """Two buffers (B, K, capacity, D); values behind a row's length are arbitrary but finite."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        # Whether they may be held by others too: by a caller, or by a graph of autograd.
        self._shared = False

    def content(self, length: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values of some rows, (B, K, length, D) each.

        Raises:
            InputError: nothing is stored yet.
        """
        if self.keys is None or self.values is None:
            raise InputError("this layer of the cache is empty; run the model with it first")
        keys, values = self.keys[:, :, :length], self.values[:, :, :length]
        return (keys, values) if rows is None else (keys[rows], values[rows])

    def _check(self, keys: Tensor, values: Tensor) -> None:
        """Check the shape of keys and values (B, K, T, D)."""
        assert self.keys is not None
        assert self.values is not None
        check_alike("keys (heads x numbers)", self.keys, keys, 1, 3)
        check_alike("values (heads x numbers)", self.values, values, 1, 3)

    def select(self, rows: Tensor) -> None:
        """Keep the rows (N,), in that order; rows may repeat."""
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys = self.keys.index_select(0, rows)
            self.values = self.values.index_select(0, rows)

    def crop(self, lengths: int | Tensor) -> None:
        """Do nothing: tokens behind a row's length are never read."""

    def snapshot(self, lengths: int | Tensor) -> None:
        """Do nothing: `crop` needs no preparation."""

    @property
    def batch_size(self) -> int | None:
        """The number of rows, or None while empty."""
        return None if self.keys is None else self.keys.shape[0]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the numbers, or None while empty."""
        return None if self.keys is None else self.keys.dtype

    @property
    def nbytes(self) -> int:
        """The allocated bytes."""
        return sum(x.nbytes for x in (self.keys, self.values) if x is not None)


class DynamicSlot(_DenseSlot):
    """Keys and values in buffers that grow by a quarter when full."""

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """Store a segment's (B, K, T, D); return all (B, K, S, D) its rows attend to."""
        if self.keys is None or self.values is None:
            if segment.rows is None:
                self.keys, self.values = keys, values
                # They may be a caller's, who sees what is written into them.
                self._shared = True
                return self.content(segment.keys)
            self.keys, self.values = _zeros(keys, segment), _zeros(values, segment)
        self._check(keys, values)
        self._unshare(segment)
        self.keys = _write(self.keys, keys, segment)
        self.values = _write(self.values, values, segment)
        self._shared = segment.learns
        return self.content(segment.keys, segment.rows)

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return the buffers, with space for the new tokens, or None while empty."""
        if self.keys is None or self.values is None:
            return None
        self._unshare(segment)
        keys, values = self.keys, self.values = (
            own(_grown(self.keys, segment)),
            own(_grown(self.values, segment)),
        )
        return keys, values

    def _unshare(self, segment: Segment) -> None:
        assert self.keys is not None
        assert self.values is not None
        if self._shared and segment.capacity <= self.keys.shape[2]:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self._shared = False

    def reset(self) -> None:
        """Empty the slot."""
        self.keys = self.values = None


class StaticSlot(_DenseSlot):
    """Keys and values in buffers of fixed capacity, returned whole.

    The shapes never change, so a compiled decode step never compiles again.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """Store a segment's (B, K, T, D); return its rows' buffers, (B, K, capacity, D)."""
        if self.keys is None or self.values is None:
            # Zeros, not empty memory: a weight of 0 times NaN would still be NaN.
            self.keys = _zeros(keys, segment, self.capacity)
            self.values = _zeros(values, segment, self.capacity)
        self._check(keys, values)
        shared = self._shared or not (writable(self.keys, keys, values) and writable(self.values))
        self.keys = _scattered(self.keys, keys, segment, shared=shared)
        self.values = _scattered(self.values, values, segment, shared=shared)
        self._shared = segment.learns
        # Whole, where all rows are meant: shapes that never change.
        return self.content(self.capacity if segment.rows is None else segment.keys, segment.rows)

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return the buffers, or None before they are allocated."""
        if self.keys is None or self.values is None:
            return None
        give = torch.clone if self._shared else own
        self.keys, self.values, self._shared = give(self.keys), give(self.values), False
        return self.keys, self.values

    def reset(self) -> None:
        """Empty the slot; memory stays."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self._zeroed(self.keys), self._zeroed(self.values)
            self._shared = False

    def _zeroed(self, buffer: Tensor) -> Tensor:
        reusable = writable(buffer) and not self._shared
        return buffer.zero_() if reusable else torch.zeros_like(buffer)


def _whole(name: str, value: object, most: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        above = "" if most == math.inf else f", at most {most}"
        raise InputError(f"{name}={shown(value)} has to be an integer of at least 1{above}")


class DynamicCache(Cache):
    """A growing cache of keys and values and of recurrent states.

    Without a config, it gets the layers of the first model that uses it, or one for each index
    that `update` is given.
    """

    def __init__(
        self, config: PreTrainedConfig | None = None, *, num_hidden_layers: int | None = None
    ) -> None:
        if num_hidden_layers is not None:
            _whole("num_hidden_layers", num_hidden_layers, MOST_LAYERS)
            super().__init__([DynamicSlot() for _ in range(num_hidden_layers)])
        elif config is None:
            super().__init__([])
        elif not isinstance(config, PreTrainedConfig):
            raise InputError(f"config is a {named(config)}; it has to be a model's config")
        else:
            super().__init__(*_slots(config, DynamicSlot, RecurrentSlot))

    def fit(self, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> None:
        """Adopt the layers of a model if there are none yet, else check that they match.

        Raises:
            InputError: there are more, or fewer, or what they hold is in another dtype.
        """
        if not self.layers:
            self.layers, self.states = _slots(config, DynamicSlot, RecurrentSlot)
        super().fit(config, dtype)

    def _attention(self, layer_idx: int) -> AttentionSlot:
        if not self.states:
            self.layers += [DynamicSlot() for _ in range(len(self.layers), layer_idx + 1)]
        return super()._attention(layer_idx)


class StaticCache(Cache):
    """A cache of `max_cache_len` tokens per row, allocated once.

    The memory is taken at the first forward, when batch, dtype and device are known. Lengths are
    a tensor changed in place, so that one compiled step serves every position.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int) -> None:
        _whole("max_cache_len", max_cache_len)
        super().__init__(
            *_slots(
                config,
                lambda: StaticSlot(max_cache_len),
                lambda: RecurrentSlot(preallocated=True),
            )
        )
        self.max_cache_len = max_cache_len

    def segment(
        self, batch: int, length: int, device: torch.device, counts: Tensor | None
    ) -> Segment:
        """Return the slots of the next `length` tokens of `batch` rows.

        Raises:
            InputError: the cache holds another number of rows.
            ContextLengthError: there is no room for them.
        """
        unused = self.batch_size is None
        if isinstance(self._lengths, int) or (unused and len(self._lengths) != batch):
            self._lengths = torch.zeros(batch, dtype=torch.long, device=device)
        elif locked(self._lengths):
            self._lengths = self._lengths.clone()
        segment = super().segment(batch, length, device, counts)
        if not torch.compiler.is_compiling():
            longest = self.get_seq_length()
            if longest + length > self.max_cache_len:
                raise ContextLengthError(
                    f"the cache has room for max_cache_len={self.max_cache_len} tokens a row, "
                    f"holds up to {longest} and was given {length} more; make a larger one"
                )
        return Segment(segment.start, length, self.max_cache_len, segment.counts, device)

    def advance(self, segment: Segment) -> None:
        assert isinstance(self._lengths, Tensor)
        self._finish(segment)
        self._lengths.add_(segment.length if segment.counts is None else segment.counts)

    def seek(self, position: Tensor) -> None:
        """Continue every row at slot `position` (a scalar)."""
        if torch.compiler.is_compiling() and isinstance(self._lengths, Tensor):
            if self.states:
                # Going back would take a snapshot, which a compiled step does not look for.
                torch._assert_async((position == self._lengths).all(), NO_WAY_BACK)
            self._lengths.copy_(position.expand_as(self._lengths))
        else:
            super().seek(position)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return _longest(self._lengths)

    def get_max_cache_shape(self) -> int | None:
        return self.max_cache_len

    def reset(self) -> None:
        lengths = self._lengths
        super().reset()
        if isinstance(lengths, Tensor):
            self._lengths = lengths.zero_()


def _slots(
    config: PreTrainedConfig,
    attention: Callable[[], AttentionSlot],
    recurrent: Callable[[], StateSlot],
) -> tuple[list[AttentionSlot | None], list[StateSlot | None]]:
    """Build one slot per layer of the config."""
    attends, recurs = config.attention_layers(), config.recurrent_layers()
    layers = range(config.num_hidden_layers)
    return (
        [attention() if i in attends else None for i in layers],
        [recurrent() if i in recurs else None for i in layers] if recurs else [],
    )


def _zeros(new: Tensor, segment: Segment, capacity: int | None = None) -> Tensor:
    """Allocate a zero buffer for tensors like `new` (B, K, T, D), for all rows of a cache."""
    rows = len(new) if segment.batch is None else segment.batch
    return new.new_zeros(rows, new.shape[1], capacity or segment.capacity, new.shape[3])


def _write(buffer: Tensor, new: Tensor, segment: Segment) -> Tensor:
    """Write `new` (B, K, T, D) at a segment's slots, and return the buffer."""
    if not writable(buffer, new):
        short = segment.capacity - buffer.shape[2]
        wide = F.pad(buffer, (0, 0, 0, max(short, 0)))
        return _scattered(wide, new, segment, shared=True)
    buffer = _grown(buffer, segment)
    if isinstance(segment.start, int):
        target = buffer if segment.rows is None else buffer[segment.rows]
        target[:, :, segment.start : segment.start + segment.length] = new
        return buffer
    return _scattered(buffer, new, segment, shared=False)


def _scattered(buffer: Tensor, new: Tensor, segment: Segment, *, shared: bool) -> Tensor:
    """Scatter `new` (B, K, T, D) to a segment's slots, into a copy if the buffer is shared."""
    places = segment.slots()[:, None, :, None].expand_as(new)
    if segment.rows is None:
        return buffer.scatter(2, places, new) if shared else buffer.scatter_(2, places, new)
    if shared:
        buffer = buffer.clone()
    buffer[segment.rows].scatter_(2, places, new)
    return buffer


def _grown(buffer: Tensor, segment: Segment) -> Tensor:
    short = segment.capacity - buffer.shape[2]
    return buffer if short <= 0 else F.pad(buffer, (0, 0, 0, short + segment.capacity // 4 + 64))
