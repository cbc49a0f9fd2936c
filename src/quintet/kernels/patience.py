"""Logs what a slow operation is waiting for."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Python writes warnings of a logger nobody set up to standard error.
log = logging.getLogger("quintet.kernels")
# Seconds.
SILENT = 2.0


@contextmanager
def told(text: str) -> Iterator[None]:
    """Log a text if the context takes more than two seconds."""
    timer = threading.Timer(SILENT, log.warning, ("%s", text))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
