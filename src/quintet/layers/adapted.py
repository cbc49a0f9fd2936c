"""Modules whose forward an adapter has replaced.

An adapter puts a forward of its own in the place of a module's, so that all that runs modules
uncalled leaves the module alone (`quintet.layers.plain`). What it cannot see from there, the rows
and the layer that a forward is at, it is told here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from threading import get_ident

import torch
from torch import Tensor, nn

from quintet.layers.plain import called_only


class AdaptedForward(ABC):
    """A forward that replaces a module's own."""

    @abstractmethod
    def matrix(self) -> Tensor | None:
        """Return the merged matrix (O, I), or None if the change is more than a matrix.

        It is in the dtype of the module's own, and no gradient passes it.
        """


@dataclass(frozen=True, slots=True)
class AdapterPlace:
    """The adapter of each row, and the layer a forward is in.

    Attributes:
        layer: the number of the layer; None outside of them.
        names: the adapters that rows may have; None for none.
        rows: (B,) the number of each row's among `names`; None if all have those in use.
        tokens: (B, T) the same for each token, as hidden states lie; None if only rows are
            known.
        copied: whether each of the rows may be several, side by side.
    """

    layer: int | None = None
    names: tuple[str | None, ...] = ()
    rows: Tensor | None = None
    tokens: Tensor | None = None
    copied: bool = False

    def for_rows(self, B: int) -> "AdapterPlace | None":
        """Return the place for B rows, or None if the number of rows differs."""
        assert self.rows is not None
        copies, rest = divmod(B, len(self.rows))
        if rest or (copies != 1 and not self.copied):
            return None
        return replace(self, rows=self.rows.repeat_interleave(copies)) if copies > 1 else self

    def per_vector(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return the adapter's number for each vector of a tensor (*shape, C)."""
        assert self.rows is not None
        tokens = self.tokens
        if tokens is not None and tokens.numel() == torch.Size(shape).numel():
            return tokens.to(device).reshape(shape)
        rows = self.rows.to(device)
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)


@dataclass(slots=True, eq=False)
class Places:
    """The place of each thread's forward through a model."""

    now: dict[int, AdapterPlace] = field(default_factory=dict)

    def current(self) -> AdapterPlace | None:
        """Return the place of this thread's forward, or None."""
        return self.now.get(get_ident()) if self.now else None

    def refine(self, place: AdapterPlace) -> None:
        """Narrow the place of this thread's forward until the surrounding `at` ends."""
        self.now[get_ident()] = place

    @contextmanager
    def at(self, place: AdapterPlace) -> Iterator[None]:
        """Set the place of this thread's forward inside the context."""
        thread = get_ident()
        before = self.now.get(thread)
        self.now[thread] = place
        try:
            yield
        finally:
            if before is None:
                del self.now[thread]
            else:
                self.now[thread] = before

    def __deepcopy__(self, memo: object) -> "Places":
        return Places()

    def __reduce__(self) -> tuple[type["Places"], tuple[()]]:
        return Places, ()


@dataclass(frozen=True, slots=True)
class Placing:
    """A place, and where to set it."""

    places: Places
    place: AdapterPlace

    def at_layer(self, layer: int) -> "Placing":
        """Return it for one layer."""
        return Placing(self.places, replace(self.place, layer=layer))

    def of_rows(self, rows: slice | None) -> "Placing":
        """Return it for part of the rows."""
        own = self.place.rows
        if own is None:
            return self
        part = own if rows is None else own[rows]
        return Placing(self.places, replace(self.place, rows=part, tokens=None))


def placed(placing: Placing | None) -> AbstractContextManager[None]:
    """Set the place of this thread's forward inside the context, if there is one."""
    return nullcontext() if placing is None else placing.places.at(placing.place)


def matrix_in_use(module: nn.Module) -> Tensor | None:
    """Return the merged matrix of an adapted map, or None if it must be called."""
    forward = vars(module).get("forward")
    if not isinstance(forward, AdaptedForward) or called_only(module):
        return None
    return forward.matrix()
