"""The argument `adapter_names`: an adapter per row of a batch."""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

Call = TypeVar("Call", bound=Callable[..., Any])
AdapterNames = Sequence[str | None] | None


class ByRow(Protocol):
    """An object that can use an adapter per row."""

    def each_row(
        self, adapter_names: Sequence[str | None], *, copied: bool = False
    ) -> AbstractContextManager[None]:
        """Use an adapter per row inside, in this thread."""
        ...


def takes_adapters(call: Call) -> Call:
    """Add the argument `adapter_names` to a method and its signature."""

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
