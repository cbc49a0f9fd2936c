"""The registry of backends: who computes an operation on a device and dtype.

An operation has a name and a definition in PyTorch, which says what it computes and serves wherever
nothing else does. A backend is a folder with implementations of some operations; `register` makes
them known, and which come before the definition is settled there and then, not with each call.
`QUINTET_BACKENDS_OFF=kernels` leaves out the backends of those names, divided by commas;
`QUINTET_BACKENDS_ON` asks for those that serve only on request.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from quintet.errors import InputError, MissingDependencyError

P = ParamSpec("P")
R = TypeVar("R")
PYTORCH = "PyTorch"
OFF, ON = "QUINTET_BACKENDS_OFF", "QUINTET_BACKENDS_ON"


@dataclass(frozen=True, slots=True)
class Implementation:
    """A backend's implementation of an operation.

    Attributes:
        function: takes what the operation takes, and returns what the definition would, or None
            where it does not apply: to these shapes, this layout, while gradients are wanted.
        dtypes: of the tensors that it takes.
        needs: what else has to be so, in words.
    """

    function: Callable[..., Any]
    dtypes: frozenset[torch.dtype]
    needs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Implementations for one type of device.

    Attributes:
        name: what it is switched off by.
        device: the type of device, such as "cpu".
        implementations: of each operation, by its name; the first that applies serves.
        missing: says why there is none on this machine, without making one; None if there is.
        on_request: whether it serves only where it is asked for by its name.
    """

    name: str
    device: str
    implementations: Mapping[str, Sequence[Implementation]]
    missing: Callable[[], str | None]
    on_request: bool = False


class Operation(Generic[P, R]):
    """A function with a definition in PyTorch that backends may implement.

    Attributes:
        name: what it is called in `Backend.implementations`.
        definition: what it computes, in PyTorch; of what only backends do in one pass, a function
            that returns None, and the caller takes the steps.
        order: what is asked before the definition.
    """

    def __init__(self, name: str, definition: Callable[P, R]) -> None:
        self.name = name
        self.definition = definition
        self.order: tuple[Callable[P, R | None], ...] = ()
        update_wrapper(self, definition)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the first backend that applies, else the definition."""
        output = self.by_backend(*args, **kwargs)
        return self.definition(*args, **kwargs) if output is None else output

    def by_backend(self, *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Run the first backend that applies, or return None if none does."""
        for function in self.order:
            output = function(*args, **kwargs)
            if output is not None:
                return output
        return None


class Registry:
    """All operations and backends."""

    def __init__(self, off: Sequence[str] = (), on: Sequence[str] = ()) -> None:
        self.operations: dict[str, Operation[Any, Any]] = {}
        self.backends: tuple[Backend, ...] = ()
        self.off, self.on = frozenset(off), frozenset(on)

    def operation(self, name: str) -> Callable[[Callable[P, R]], Operation[P, R]]:
        """Declare a function as the definition of an operation."""

        def declared(definition: Callable[P, R]) -> Operation[P, R]:
            new = Operation(name, definition)
            self.operations[name] = new
            self._order_implementations()
            return new

        return declared

    def register(self, backend: Backend) -> None:
        """Add a backend, ahead of those registered earlier.

        Raises:
            InputError: there is one of that name.
            MissingDependencyError: it is asked for, and this machine has none.
        """
        if any(known.name == backend.name for known in self.backends):
            raise InputError(f"there is a backend {backend.name!r}; give this one another name")
        reason = backend.missing() if backend.on_request and backend.name in self.on else None
        if reason is not None:
            raise MissingDependencyError(
                f"{ON} asks for {backend.name!r}, and {reason}; install it, or leave it out"
            )
        self.backends = (backend, *self.backends)
        self._order_implementations()

    @contextmanager
    def registered(self, backend: Backend) -> Iterator[None]:
        """Register a backend inside the context, for all threads."""
        self.register(backend)
        try:
            yield
        finally:
            self.backends = tuple(known for known in self.backends if known is not backend)
            self._order_implementations()

    @contextmanager
    def asking(self, name: str) -> Iterator[None]:
        """Ask for a backend that serves on request inside the context, for all threads."""
        before, self.on = self.on, self.on | {name}
        self._order_implementations()
        try:
            yield
        finally:
            self.on = before
            self._order_implementations()

    def served(self, device: str, dtype: torch.dtype) -> dict[str, str]:
        """Return the name of the backend that serves each operation on a device and dtype.

        Where the shapes are not what that one needs, PyTorch does.
        """
        available = [b for b in self._active() if b.device == device and b.missing() is None]
        return {
            name: next((b.name for b in available if _takes(b, name, dtype)), PYTORCH)
            for name in self.operations
        }

    def _active(self) -> list[Backend]:
        return [
            backend
            for backend in self.backends
            if backend.name not in self.off and (not backend.on_request or backend.name in self.on)
        ]

    def _order_implementations(self) -> None:
        for name, declared in self.operations.items():
            declared.order = tuple(
                one.function
                for backend in self._active()
                for one in backend.implementations.get(name, ())
            )


def _takes(backend: Backend, name: str, dtype: torch.dtype) -> bool:
    return any(dtype in one.dtypes for one in backend.implementations.get(name, ()))


# Of the process, as the devices are that it is about.
REGISTRY = Registry(*(os.environ.get(name, "").split(",") for name in (OFF, ON)))
operation = REGISTRY.operation
