"""Waiting for what happens, on a machine that may be at work for others as well.

A test waits for an event and never for a time to pass; what must not hang ends after `PATIENCE`.
That something is quick is said in a processor's time (`work.py`), in steps of what does it, or,
where only the clock tells, by the best of some tries: others make a try slower and never quicker.
"""

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["PATIENCE", "in_some_try", "until"]

# Seconds: longer than anything here takes, and shorter than anybody waits for tests.
PATIENCE = 180.0
T = TypeVar("T")


def until(what: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not so within {seconds:.0f} s"
        time.sleep(0.005)


def in_some_try(measure: Callable[[], T], holds: Callable[[T], bool], tries: int = 8) -> T:
    """Measure until something holds, as it does in one of few tries or never; return what did."""
    found: list[T] = []
    while not found or not holds(found[-1]):
        assert len(found) < tries, f"in none of {tries} tries: {found}"
        found.append(measure())
    return found[-1]
