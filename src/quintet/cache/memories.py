"""The memory of all layers of a pool."""

from collections.abc import Iterable, Sequence

from quintet.cache.content import RowContent
from quintet.cache.row_memory import RowMemory
from quintet.cache.rows import Row, RowTable
from quintet.cache.state_rows import StateRows
from quintet.errors import ContextLengthError, InputError


class RowMemories:
    """The memories of all layers, for operations on a row of all of them.

    Attributes:
        tokens: of the layers with attention.
        states: of the recurrent layers.
    """

    def __init__(self) -> None:
        self.tokens: list[RowMemory] = []
        self.states: list[StateRows] = []

    @property
    def kind(self) -> str:
        """The storage format of tokens."""
        return self.tokens[0].kind if self.tokens else "states"

    def bytes_of_rows(self, rows: int, capacity: int) -> tuple[int, int]:
        """Return the bytes of a row without tokens, and of each token."""
        states = sum(slot.buffered for slot in self.states)
        return states // rows, sum(slot.nbytes for slot in self.tokens) // (rows * capacity)

    def read(self, index: int, start: int, stop: int) -> RowContent:
        """Copy some tokens of a row, with the states behind them if available."""
        states = None
        if self.reach(index, stop) == stop:
            states = tuple(slot.state_at(index, stop) for slot in self.states)
        layers = tuple(slot.read(index, start, stop) for slot in self.tokens)
        return RowContent(start, stop, layers, states, self.kind)

    def check(self, length: int, contents: Sequence[RowContent], capacity: int) -> None:
        """Check that contents fit behind a row's first tokens, before writing.

        Raises:
            InputError: they are not what follows, not of this kind of memory or model, or their
                end comes without the states of recurrent layers.
            ContextLengthError: they are longer than a row.
        """
        for content in contents:
            if content.start != length:
                raise InputError(
                    f"the row holds {length} tokens and the content is of the slots "
                    f"{content.start} to {content.stop}; give what follows"
                )
            length = content.stop
            if len(content.layers) != len(self.tokens) or content.kind != self.kind:
                raise InputError(
                    f"the content is {content.kind} of {len(content.layers)} layers, and the pool "
                    f"keeps {self.kind} of {len(self.tokens)}; extract it from such a pool"
                )
            for slot, tensors in zip(self.tokens, content.layers, strict=True):
                slot.check(tensors)
            for state, tensors in zip(self.states, content.states or (), strict=False):
                state.check(tensors)
        if contents and contents[-1].states is None:
            raise InputError(
                f"the content up to slot {length} comes without the states of recurrent layers; "
                "extract it where the row ends, or has a snapshot"
            )
        if length > capacity:
            raise ContextLengthError(
                f"the pool has room for capacity={capacity} tokens a row and the content is of "
                f"{length}; make a larger one"
            )

    def write(self, index: int, contents: Sequence[RowContent]) -> None:
        """Write contents that `check` has passed into a row."""
        for content in contents:
            for slot, tensors in zip(self.tokens, content.layers, strict=True):
                slot.write(index, content.start, tensors)
        for state, tensors in zip(self.states, contents[-1].states or (), strict=True):
            state.write(index, tensors)

    def copy(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for slot in self.tokens:
            slot.copy(source, target)
        for state in self.states:
            state.copy(source, target)

    def clear(self, table: RowTable, ends: Sequence[int], stop: int) -> None:
        """Fill rows with finite numbers up to a slot, as masked queries read them.

        Those up to where a row's tokens of this forward end are written anyway.
        """
        for index, (row, own) in enumerate(zip(table, ends, strict=True)):
            start = max(row.finite, own)
            if start < stop:
                for slot in self.tokens:
                    slot.clear(index, start, stop)

    def reach(self, index: int, length: int) -> int:
        """Return the greatest length, at most the given one, that a row can return to."""
        return min((slot.reach(index, length) for slot in self.states), default=length)

    def share(self, source: Row, target: Row) -> None:
        """Give a row the snapshots of another."""
        for slot in self.states:
            slot.share(source, target)

    def drop(self, row: Row, lengths: Iterable[int] | None = None) -> None:
        """Drop a row's snapshots at some lengths, or all."""
        for slot in self.states:
            slot.drop(row, lengths)
