"""How much work something is, whatever machine it is done on and whatever else that does."""

import functools
import time
from collections.abc import Callable

__all__ = ["in_sums"]


def in_sums(run: Callable[[], object]) -> float:
    """The processor's time of a call, in sums of ten million numbers: about a tenth of a second."""
    return _thread_time(run) / _sum()


@functools.cache
def _sum() -> float:
    return min(_thread_time(lambda: sum(range(10_000_000))) for _ in range(3))


def _thread_time(run: Callable[[], object]) -> float:
    began = time.thread_time()
    run()
    return time.thread_time() - began
