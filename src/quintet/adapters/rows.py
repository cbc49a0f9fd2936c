"""Calls that take `adapter_names`: an adapter for each row of a batch."""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

Call = TypeVar("Call", bound=Callable[..., Any])
AdapterNames = Sequence[str | None] | None


class ByRow(Protocol):
    """What can use an adapter for each row."""

    def each_row(
        self, adapter_names: Sequence[str | None], *, copied: bool = False
    ) -> AbstractContextManager[None]:
        """Use an adapter for each row inside, in this thread."""
        ...


def takes_adapters(call: Call) -> Call:
    """Let a method take `adapter_names`, and name it in the signature that tools read."""

    @functools.wraps(call)
    def run(self: ByRow, *args: Any, **inputs: Any) -> Any:
        names = inputs.pop("adapter_names", None)
        if names is None:
            return call(self, *args, **inputs)
        with self.each_row(names):
            return call(self, *args, **inputs)

    signature = inspect.signature(call)
    kind = inspect.Parameter.KEYWORD_ONLY
    own = inspect.Parameter("adapter_names", kind, default=None, annotation=AdapterNames)
    vars(run)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), own])
    return run  # type: ignore[return-value]
