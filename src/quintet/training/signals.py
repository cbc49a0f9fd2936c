"""Ctrl-C and SIGTERM: the first ends a training after its step, the second at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NOTICE = b"\nending after this step, when it is saved; once more ends it at once\n"
HEEDED = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a training was told to end.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def end(self) -> None:
        """End with the exception that the signal's sender expects.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM, with 143.
        """
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)


@contextmanager
def heeded(*, says: bool = True) -> Iterator[Stop]:
    """Note the first signal; the next one acts as before.

    Signals reach the main thread alone; in another nothing is changed.

    Args:
        says: whether this process says so; of several one does.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in HEEDED}

    def restore() -> None:
        for number, handler in before.items():
            # None is a handler that was not set from Python, and cannot be either.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def heed(number: int, frame: FrameType | None) -> None:
        restore()
        stop.received = signal.Signals(number)
        # What prints may be interrupted right here, and cannot be entered twice.
        with suppress(OSError):
            os.write(2, NOTICE if says else b"")

    for number, handler in before.items():
        # What was told to be ignored, as by nohup, goes on to be.
        if handler is not signal.SIG_IGN:
            signal.signal(number, heed)
    try:
        yield stop
    finally:
        restore()
