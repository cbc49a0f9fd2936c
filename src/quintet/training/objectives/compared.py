"""Models that the one which trains is compared with, where several processes have parts of them."""

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Running(Protocol):
    """Runs forwards of a model that may be sharded."""

    def __call__(self, call: Callable[[], T], /) -> T:
        """Return the result of a call that runs the model."""
        ...


def run_local(call: Callable[[], T]) -> T:
    """Return the result of a call on a model that is whole in this process."""
    return call()
