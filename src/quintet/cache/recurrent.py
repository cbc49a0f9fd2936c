"""The state of a state-space layer: the convolution's last inputs, and the recurrent state.

Neither grows with the text, so there is nothing to crop. To go back all the same, as speculative
decoding does, a slot remembers its content at a `snapshot` and the inputs it gets from there on:
from these the state after any number of them can be computed again.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.cache.memory import own, writable
from quintet.cache.segment import Segment
from quintet.errors import InputError
from quintet.kernels.ssm import MixerWeights
from quintet.ops.conv import continued, last_window
from quintet.ops.mamba2 import mix
from quintet.ops.ssd import only, ssd

# The tokens of a forward that one call of a kernel takes, at the most.
RECORDED = 64


class Inputs(NamedTuple):
    """The inputs of one update; axis letters as in `quintet.ops.ssd`.

    Attributes:
        raw: (B, T, C) what entered the convolution.
        x: (B, T, H, P).
        dt: (B, T, H), 0 for padding.
        A: (H,).
        b: (B, T, G, N).
        counts: (B,) how many of the T are real, T where all are.
    """

    raw: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    b: Tensor
    counts: Tensor | int

    def first(self, counts: Tensor | int) -> "Inputs":
        """Treat all but the first `counts` tokens of each row as padding."""
        return self._replace(dt=only(self.dt, counts), counts=counts)

    @property
    def device(self) -> torch.device:
        """Their device."""
        return self.dt.device

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        return sum(x.nbytes for x in (self.raw, self.x, self.dt, self.b))

    def select(self, rows: Tensor) -> "Inputs":
        """Return the given rows."""
        counts = self.counts if isinstance(self.counts, int) else self.counts[rows]
        return Inputs(self.raw[rows], self.x[rows], self.dt[rows], self.A, self.b[rows], counts)

    def row(self, index: int, T: int) -> "Inputs":
        """Return the inputs of one row's first T tokens, (1, T, ...)."""
        raw, x, dt, b = (y[index, None, :T] for y in (self.raw, self.x, self.dt, self.b))
        return Inputs(raw, x, dt, self.A, b, T)

    def after(self, window: Tensor | None, state: Tensor | None, W: int) -> tuple[Tensor, Tensor]:
        """Return window (B, W - 1, C) and state behind these tokens."""
        window = last_window(continued(self.raw, window, W), W, self.counts)
        return window, ssd(
            self.x, self.dt, self.A, self.b, self.b, torch.zeros_like(self.A), state
        )[1]


class Recorded(NamedTuple):
    """The projections that a kernel recorded in one forward.

    Attributes:
        projected: (B, T, H·P + C + H), what the mixer's first map made.
        weights: of the mixer, which do the rest.
        counts: (B,) how many of the T are real, T where all are.
    """

    projected: Tensor
    weights: MixerWeights
    counts: Tensor | int

    @property
    def device(self) -> torch.device:
        """Their device."""
        return self.projected.device

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        return self.projected.nbytes

    def first(self, counts: Tensor | int) -> "Recorded":
        """Treat all but the first `counts` tokens of each row as padding."""
        return self._replace(counts=counts)

    def select(self, rows: Tensor) -> "Recorded":
        """Return the given rows."""
        counts = self.counts if isinstance(self.counts, int) else self.counts[rows]
        return Recorded(self.projected[rows], self.weights, counts)

    def row(self, index: int, T: int) -> "Recorded":
        """Return the record of one row's first T tokens, (1, T, ...)."""
        return Recorded(self.projected[index, None, :T], self.weights, T)

    @torch.no_grad()
    def after(
        self, window: Tensor | None, state: Tensor | None, W: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return window and state behind these tokens; may overwrite the given state."""
        projected, counts = self.projected, None
        if isinstance(self.counts, Tensor):
            counts = self.counts
        else:
            projected = projected[:, : self.counts]
        if not projected.shape[1]:
            return window, state
        mixed = mix(projected, self.weights, window, state, counts, chunk_size=RECORDED)
        return mixed.window, mixed.state


class Recorder:
    """Memory in which a kernel records a forward's projections.

    Attributes:
        memory: (RECORDED, H·P + C + H), the same for every forward; None before the first.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self._weights: MixerWeights | None = None

    def start(self, weights: MixerWeights, like: Tensor) -> Tensor:
        """Return the memory for a new forward, with dtype and device of `like`."""
        if self.memory is None:
            width = len(weights.norm) + len(weights.taps) + len(weights.D)
            with torch.inference_mode(False), torch.no_grad():
                self.memory = torch.empty(RECORDED, width, dtype=like.dtype, device=like.device)
        self._weights = weights
        return self.memory

    def cancel(self) -> None:
        """Discard the present recording."""
        self._weights = None

    def stop(self, segment: Segment, rows: int) -> Recorded | None:
        """Return a copy of the recording, or None if there is none."""
        weights, self._weights = self._weights, None
        if weights is None or self.memory is None:
            return None
        T, counts = segment.length, segment.counts
        if counts is None:
            projected = torch.unflatten(self.memory[: rows * T].clone(), 0, (rows, T))
            return Recorded(projected, weights, T)
        steps = torch.arange(T, dtype=torch.long, device=counts.device)
        places = (counts.cumsum(0) - counts)[:, None] + steps
        projected = self.memory[places.clamp(max=int(counts.sum()) - 1)]
        return Recorded(projected, weights, counts)


@dataclass(slots=True)
class _Snapshot:
    """Lengths and content at one moment, and the inputs since."""

    lengths: int | Tensor
    window: Tensor | None
    state: Tensor | None
    since: list[Inputs | Recorded] = field(default_factory=list)


class RecurrentSlot:
    """A convolution window (B, W - 1, C) and a state (B, H, P, N), updated in place.

    Args:
        preallocated: keep the memory when all is forgotten.
    """

    def __init__(self, *, preallocated: bool = False) -> None:
        self.window: Tensor | None = None
        self.state: Tensor | None = None
        self.preallocated = preallocated
        self._snapshot: _Snapshot | None = None
        self._recorder = Recorder()

    @property
    def remembers(self) -> bool:
        """Whether a snapshot needs the inputs of later updates."""
        return self._snapshot is not None

    def remember(self, inputs: Inputs) -> None:
        """Keep an update's inputs, to go back to points after the snapshot."""
        assert self._snapshot is not None
        self._recorder.cancel()
        self._snapshot.since.append(inputs)

    def record(self, weights: MixerWeights) -> Tensor:
        """Return memory in which a kernel records its projections, instead of `remember`.

        It is (M, H·P + C + H) for the tokens of all rows, one behind the other, and read when the
        cache counts them.
        """
        assert self.window is not None
        return self._recorder.start(weights, self.window)

    def advance(self, segment: Segment) -> None:
        """Keep a kernel's recording of the counted tokens."""
        if self._snapshot is not None and self.state is not None:
            recorded = self._recorder.stop(segment, len(self.state))
            self._snapshot.since += [] if recorded is None else [recorded]

    def buffers(self) -> tuple[Tensor, Tensor] | None:
        """Return window and state to update in place, or None while empty.

        None while there are none. Where the slot remembers, `record` has to be written, too.
        """
        return self.content()

    def content(self) -> tuple[Tensor, Tensor] | None:
        """Return window and state, or None; the caller may overwrite them."""
        if self.window is None or self.state is None:
            return None
        window, state = self.window, self.state = own(self.window), own(self.state)
        return window, state

    def update(self, window: Tensor, state: Tensor, segment: Segment | None = None) -> None:
        """Store window and state after a forward, for a segment's rows or all."""
        if segment is None or segment.rows is None:
            self.window = _stored(self.window, window)
            self.state = _stored(self.state, state)
            return
        if self.content() is None:
            rows = len(state) if segment.batch is None else segment.batch
            self.window = window.new_zeros(rows, *window.shape[1:])
            self.state = state.new_zeros(rows, *state.shape[1:])
        assert self.window is not None
        assert self.state is not None
        self.window = _placed(self.window, window, segment.rows)
        self.state = _placed(self.state, state, segment.rows)

    def snapshot(self, lengths: int | Tensor) -> None:
        """Copy the content of rows of these lengths, and remember later inputs.

        The memory for what comes after grows with it, until the next snapshot.
        """
        lengths = lengths.clone() if isinstance(lengths, Tensor) else lengths
        window, state = (None if x is None else x.clone() for x in (self.window, self.state))
        self._snapshot = _Snapshot(lengths, window, state)
        self._recorder.cancel()

    def crop(self, lengths: int | Tensor) -> None:
        """Go back to where rows had these lengths, at or after the snapshot.

        Raises:
            InputError: that is before the snapshot, or there is none.
        """
        snapshot = self._snapshot
        wanted = _as_tensor(lengths)
        snapshot_lengths = None if snapshot is None else _as_tensor(snapshot.lengths)
        if (
            snapshot is None
            or snapshot_lengths is None
            or bool((wanted.to(snapshot_lengths.device) < snapshot_lengths).any())
        ):
            has = (
                "there is none"
                if snapshot_lengths is None
                else f"it was at {snapshot_lengths.tolist()} tokens"
            )
            raise InputError(
                f"a recurrent layer cannot go back to {wanted.tolist()} tokens: it can from its "
                f"last snapshot on, and {has}; call cache.snapshot() before the tokens that may be "
                "taken back"
            )
        self._recorder.cancel()
        remaining = lengths - snapshot.lengths
        W = 1 if self.window is None else self.window.shape[1] + 1
        window, state = (
            None if x is None else x.clone() for x in (snapshot.window, snapshot.state)
        )
        since, snapshot.since = snapshot.since, []
        for taken in since:
            remaining = remaining.to(taken.device) if isinstance(remaining, Tensor) else remaining
            counts = _smaller(remaining, taken.counts)
            remaining = remaining - counts
            snapshot.since.append(taken := taken.first(counts))
            window, state = taken.after(window, state, W)
        if window is None or state is None:
            self._clear()
        else:
            self.window = _stored(self.window, window)
            self.state = _stored(self.state, state)

    def select(self, rows: Tensor) -> None:
        """Keep the rows (N,), in that order; rows may repeat."""
        if self.window is None or self.state is None:
            return
        rows = rows.to(self.window.device)
        self.window, self.state = self.window[rows], self.state[rows]
        if self._snapshot is not None:
            old = self._snapshot
            lengths = old.lengths
            self._snapshot = _Snapshot(
                lengths if isinstance(lengths, int) else lengths[rows.to(lengths.device)],
                None if old.window is None else old.window[rows],
                None if old.state is None else old.state[rows],
                [inputs.select(rows) for inputs in old.since],
            )

    def reset(self) -> None:
        """Empty the slot; preallocated memory stays."""
        self._snapshot, self._recorder = None, Recorder()
        self._clear()

    @property
    def batch_size(self) -> int | None:
        """The number of rows, or None while empty."""
        return None if self.state is None else self.state.shape[0]

    @property
    def nbytes(self) -> int:
        """The bytes held, snapshot included."""
        tensors = [self.window, self.state, self._recorder.memory]
        if self._snapshot is not None:
            tensors += [self._snapshot.window, self._snapshot.state]
        since = [] if self._snapshot is None else self._snapshot.since
        return sum(x.nbytes for x in (*tensors, *since) if x is not None)

    def _clear(self) -> None:
        if self.preallocated and self.window is not None and self.state is not None:
            self.window, self.state = (
                x.zero_() if writable(x) else torch.zeros_like(x) for x in (self.window, self.state)
            )
        else:
            self.window = self.state = None


def _stored(old: Tensor | None, new: Tensor) -> Tensor:
    """Copy `new` into memory of its own, reusing `old` if nothing else needs that."""
    if old is new:
        return new
    if old is None or new.requires_grad or not writable(old):
        return new.clone()
    return old.copy_(new)


def _placed(buffer: Tensor, new: Tensor, rows: slice) -> Tensor:
    """Return `buffer` with new content in some rows."""
    if new.data_ptr() == buffer[rows].data_ptr():
        return buffer
    if new.requires_grad or buffer.requires_grad:
        return buffer.slice_scatter(new, 0, rows.start, rows.stop)
    buffer[rows] = new
    return buffer


def _smaller(a: Tensor | int, b: Tensor | int) -> Tensor | int:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    # A number takes the device of the tensor beside it.
    device = a.device if isinstance(a, Tensor) else None if isinstance(b, int) else b.device
    return torch.minimum(_as_tensor(a, device), _as_tensor(b, device))


def _as_tensor(lengths: Tensor | int, device: torch.device | None = None) -> Tensor:
    if isinstance(lengths, Tensor):
        return lengths if device is None else lengths.to(device)
    return torch.tensor(lengths, dtype=torch.long, device=device or "cpu")
