"""A bar on standard error for what takes long, where somebody looks."""

import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["Progress"]

WIDTH = 24
UNIT = 1e9


class Progress:
    """How many of the bytes are done; nothing is shown off a terminal, or in the first second.

    `HF_HUB_DISABLE_PROGRESS_BARS=1`, which the downloads obey, keeps it away, too.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._clock = what, max(total, 1), clock
        self._stream = sys.stderr if stream is None else stream
        off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in (
            "1",
            "ON",
            "YES",
            "TRUE",
        )
        self._shown = not off and self._stream is not None and self._stream.isatty()
        self._next = clock() + 1.0
        self._done, self._wide = 0, 0

    def add(self, count: int) -> None:
        """Count bytes that are done, and draw the bar ten times a second at most."""
        self._done += count
        if self._shown and (now := self._clock()) >= self._next:
            self._next = now + 0.1
            self._draw()

    def close(self) -> None:
        """Take the bar away."""
        if self._wide:
            self._stream.write("\r" + " " * self._wide + "\r")
            self._stream.flush()
            self._wide = 0

    def _draw(self) -> None:
        share = min(self._done / self._total, 1.0)
        bar = "#" * int(share * WIDTH)
        line = (
            f"{self._what} [{bar:<{WIDTH}}] {share:4.0%} "
            f"{self._done / UNIT:.1f} of {self._total / UNIT:.1f} GB"
        )
        self._stream.write(f"\r{line:<{self._wide}}")
        self._stream.flush()
        self._wide = max(self._wide, len(line))
