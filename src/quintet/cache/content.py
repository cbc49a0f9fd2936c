"""The content of a pool's row, copied out of it."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from torch import Tensor

from quintet.errors import InputError


@dataclass(frozen=True, slots=True, eq=False)
class RowContent:
    """A copy of a row's content for a range of its tokens.

    Attributes:
        start: the slot of the first token.
        stop: the slot behind the last one.
        layers: what each layer with attention holds of them, tensors (K, stop - start, D).
        states: each recurrent layer's window and state behind the last token, none without such
            layers; None if the row did not have them for this place.
        kind: how the layers hold it.
        adapters: what is known of the adapters that the tokens were made with; None for nothing.
    """

    start: int
    stop: int
    layers: tuple[tuple[Tensor, ...], ...]
    states: tuple[tuple[Tensor, ...], ...] | None
    kind: str
    adapters: Hashable = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def resumable(self) -> bool:
        """Whether a row can continue behind these tokens."""
        return self.states is not None

    def split(self, at: int) -> "tuple[RowContent, RowContent]":
        """Split at a slot; the first part has no recurrent states.

        Raises:
            InputError: the slot is not within the content.
        """
        if not self.start < at < self.stop:
            raise InputError(
                f"content of the slots {self.start} to {self.stop} cannot be split at {at}; "
                "give a slot between"
            )
        n = at - self.start
        head = tuple(tuple(x[:, :n].clone() for x in layer) for layer in self.layers)
        tail = tuple(tuple(x[:, n:].clone() for x in layer) for layer in self.layers)
        # Without recurrent layers nothing is missing.
        between = None if self.states else self.states
        return (
            RowContent(self.start, at, head, between, self.kind, self.adapters),
            RowContent(at, self.stop, tail, self.states, self.kind, self.adapters),
        )

    def without_states(self) -> "RowContent":
        """Return the content without recurrent states."""
        return replace(self, states=None) if self.states else self

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        stored = (*self.layers, *(self.states or ()))
        return sum(x.nbytes for tensors in stored for x in tensors)
