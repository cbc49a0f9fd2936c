"""Models that the one which trains is compared with, where several processes have parts of them."""

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Running(Protocol):
    """Runs forwards of a model that may be sharded."""

    def __call__(self, call: Callable[[], T], /) -> T:
        """Return what a call makes of the model."""
        ...


def run_local(call: Callable[[], T]) -> T:
    """Return what a call makes of a model that is all here."""
    return call()
