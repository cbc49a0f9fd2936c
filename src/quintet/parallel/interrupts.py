"""Ctrl-C that is noted, and heeded where all processes can end at the same step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class Interrupts:
    """Ctrl-C that came and was not heeded yet."""

    _came: bool = False

    def take(self) -> bool:
        """Return whether an interrupt came since the last call."""
        came, self._came = self._came, False
        return came

    @contextmanager
    def noted(self, *, again: bool = True) -> Iterator[None]:
        """Note Ctrl-C inside, in place of raising `KeyboardInterrupt`.

        Args:
            again: whether a second one ends this process at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def note(number: int, frame: FrameType | None) -> None:
            if again and self._came:
                signal.signal(signal.SIGINT, before)
                raise KeyboardInterrupt
            self._came = True

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
