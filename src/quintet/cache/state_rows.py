"""The recurrent states of a pool's rows.

A state cannot be cut like a list of keys. What a row has to go back to are copies of its state,
taken at some of its lengths. Of a row's last forward, if it was over few tokens and the row had a
copy where it began, what the tokens gave to the state is kept, too, to go back to any of them.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from quintet.cache.recurrent import RECORDED, Inputs, Recorded, Recorder
from quintet.cache.row_memory import Buffers
from quintet.cache.rows import Row, RowTable
from quintet.cache.segment import Segment
from quintet.errors import InputError
from quintet.kernels.ssm import MixerWeights


class StateRows:
    """Windows (R, W - 1, C) and states (R, H, P, N), updated in place."""

    def __init__(self, table: RowTable) -> None:
        self._table = table
        self._buffers = Buffers(table)
        # By row and its length then.
        self._copies: dict[Row, dict[int, tuple[Tensor, ...]]] = {}
        self._recorder = Recorder()
        self._given: Inputs | Recorded | None = None
        # Where a row's last forward began, if it has a copy there, and what was given, (1, T, ...).
        self._last: dict[Row, tuple[int, Inputs | Recorded]] = {}

    # -- for a forward -------------------------------------------------------------------------

    @property
    def window(self) -> Tensor | None:
        """The windows of the rows in use, or None before allocation."""
        return self._buffers.in_use()[0] if self._buffers.whole else None

    @property
    def remembers(self) -> bool:
        """Whether a row has a snapshot at its present length."""
        return any(row.length in copies for row, copies in self._copies.items())

    def content(self) -> tuple[Tensor, Tensor] | None:
        """Return window and state of the rows in use, or None; may be overwritten."""
        if not self._buffers.whole:
            return None
        window, state = self._buffers.in_use()
        return window, state

    def buffers(self) -> tuple[Tensor, Tensor] | None:
        """Return window and state of all rows to update in place."""
        return self._buffers.pair()

    def update(self, window: Tensor, state: Tensor, segment: Segment) -> None:
        """Store window and state of the segment's rows after a forward."""
        if not self._buffers.whole:
            self._allocate((window[0], state[0]))
        for buffer, new in zip(self._buffers.in_use(), (window, state), strict=True):
            own = segment.rows_of(buffer)
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)

    def remember(self, inputs: Inputs) -> None:
        """Keep the inputs of an update of all rows until the next; not of a prompt."""
        self._recorder.cancel()
        self._given = inputs if inputs.raw.shape[1] <= RECORDED else None

    def record(self, weights: MixerWeights) -> Tensor:
        """Return memory in which a kernel records its projections, instead of `remember`."""
        return self._recorder.start(weights, self._buffers.whole[0])

    def advance(self, segment: Segment) -> None:
        """Sort the forward's inputs by rows, before the cache counts its tokens."""
        given = self._recorder.stop(segment, len(self._table)) or self._given
        self._given = None
        if given is None and not self._last:
            return
        for index, row in enumerate(self._table):
            if row.taking:
                self._last.pop(row, None)
                if given is not None and row.length in self._copies.get(row, ()):
                    self._last[row] = row.length, given.row(index, row.taking)

    # -- for the pool ----------------------------------------------------------------------------

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Windows and states of all rows; none before allocation."""
        return self._buffers.whole

    def stepped(self) -> None:
        """Note that rows took a token each without inputs to go back by."""
        for row in self._table:
            if row.taking:
                self._last.pop(row, None)

    def read(self, index: int) -> tuple[Tensor, ...]:
        """Copy a row's window and state; none before allocation."""
        return tuple(x[index].clone() for x in self._buffers.whole)

    def check(self, content: Sequence[Tensor]) -> None:
        """Check that content can be written here.

        Raises:
            InputError: it is of another layer or model.
        """
        self._buffers.check(content)

    def write(self, index: int, content: Sequence[Tensor]) -> None:
        """Write the result of `read` into a row; zeros for none."""
        if content and not self._buffers.whole:
            self._allocate(content)
        for place, buffer in enumerate(self._buffers.whole):
            buffer[index] = content[place] if content else 0

    def copy(self, source: int, target: int) -> None:
        """Copy the state of one row over another."""
        for buffer in self._buffers.whole:
            buffer[target] = buffer[source]

    def take(self, index: int) -> None:
        """Snapshot a row's state at its present length."""
        row = self._table[index]
        self._copies.setdefault(row, {})[row.length] = self.read(index)

    def taken(self, index: int) -> Mapping[int, tuple[Tensor, ...]]:
        """Return the snapshots of a row, by length."""
        return self._copies.get(self._table[index], {})

    def state_at(self, index: int, length: int) -> tuple[Tensor, ...]:
        """Return a row's window and state at a length from `reach`; none means zeros."""
        row, copies = self._table[index], self.taken(index)
        if length == row.length and not row.torn:
            return self.read(index)
        if length in copies or row not in self._last:
            return copies.get(length, ())
        start, given = self._last[row]
        window, state = (x[None].clone() for x in copies[start]) if copies[start] else (None, None)
        W = self._buffers.whole[0].shape[1] + 1
        mixed = given.first(length - start).after(window, state, W)
        return tuple(x[0] for x in mixed if x is not None)

    def share(self, source: Row, target: Row) -> None:
        """Give a row the snapshots of another."""
        if source in self._copies:
            self._copies[target] = dict(self._copies[source])

    def drop(self, row: Row, lengths: Iterable[int] | None = None) -> None:
        """Drop a row's snapshots at some lengths, or all."""
        copies = self._copies.get(row, {})
        if lengths is None:
            self._last.pop(row, None)
        for length in list(copies if lengths is None else lengths):
            copies.pop(length, None)
        if not copies:
            self._copies.pop(row, None)

    def reach(self, index: int, length: int) -> int:
        """Return the greatest length, at most the given one, that a row can return to."""
        row, copies = self._table[index], self.taken(index)
        if length == row.length and not row.torn:
            return length
        start, given = self._last.get(row, (length, None))
        if given is not None and start in copies and start <= length <= start + int(given.counts):
            return length
        return max((n for n in copies if n <= length), default=0)

    def back(self, index: int, length: int) -> None:
        """Return to a length from `reach`; later snapshots are dropped."""
        row = self._table[index]
        if length != row.length or row.torn:
            self.write(index, self.state_at(index, length))
        self.drop(row, [n for n in self.taken(index) if n > length])
        start, given = self._last.pop(row, (length, None))
        if given is not None and start < length:
            self._last[row] = start, given.first(min(length - start, int(given.counts)))

    # -- as every slot ---------------------------------------------------------------------------

    def select(self, rows: Tensor) -> None:
        """Keep the rows (N,), in that order; rows may repeat."""
        moved = [
            (target, source) for target, source in enumerate(rows.tolist()) if target != source
        ]
        contents = {source: self.read(source) for _, source in moved}
        for target, source in moved:
            self.write(target, contents[source])

    def crop(self, lengths: int | Tensor) -> None:
        """Return to lengths at which the rows have snapshots.

        Raises:
            InputError: there is no copy.
        """
        rows = len(self._table)
        given = [lengths] * rows if isinstance(lengths, int) else lengths.expand(rows).tolist()
        for index, length in enumerate(given):
            if self.reach(index, length) != length:
                raise InputError(
                    f"a recurrent layer cannot go back to {length} tokens of row "
                    f"{self._table[index].id}: it has copies of its state for "
                    f"{sorted(self.taken(index))}; take a snapshot there before the tokens that "
                    "may be taken back, or rewind the row and read again what is behind"
                )
        for index, length in enumerate(given):
            self.back(index, length)

    def snapshot(self, lengths: int | Tensor) -> None:
        """Snapshot all rows, replacing earlier snapshots."""
        for index, row in enumerate(self._table):
            self.drop(row)
            self.take(index)

    def reset(self) -> None:
        """Drop all snapshots; rows that join start from zeros."""
        self._copies.clear()
        self._last.clear()

    @property
    def batch_size(self) -> int | None:
        """The number of rows in use."""
        return len(self._table)

    @property
    def buffered(self) -> int:
        """The bytes of windows and states of all rows, without snapshots."""
        return self._buffers.nbytes

    @property
    def nbytes(self) -> int:
        """The allocated bytes, free rows and snapshots included."""
        all_copies = (pair for tensors in self._copies.values() for pair in tensors.values())
        copied = {id(x): x for pair in all_copies for x in pair}
        given = [one for _, one in self._last.values()]
        tensors = (*copied.values(), *given, self._recorder.memory)
        return self._buffers.nbytes + sum(x.nbytes for x in tensors if x is not None)

    def _allocate(self, like: Sequence[Tensor]) -> None:
        """Allocate rows like a window and a state."""
        self._buffers.allocate(like)
        for index in range(len(self._table)):
            self.write(index, ())
