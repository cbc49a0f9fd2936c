"""The terminal: notes beside the result, and signs that work goes on."""

import importlib
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Self, TextIO

import click

CLEAR = "\r\x1b[K"
# What a terminal obeys rather than shows, but tabs and the ends of lines; and halves of characters,
# which no stream takes.
ORDERS = dict.fromkeys(
    i for i in (*range(32), *range(127, 160), *range(0xD800, 0xE000)) if chr(i) not in "\t\n"
)


def can_dim() -> bool:
    """Return whether the terminal's user wants colours, and the terminal has them."""
    return not os.environ.get("NO_COLOR") and can_move()


def can_move() -> bool:
    """Return whether the terminal can erase written text."""
    return os.environ.get("TERM") != "dumb"


def width(stream: TextIO | None) -> int | None:
    """Return the width of the terminal that a stream leads to, or None."""
    try:
        if stream is None or not stream.isatty():
            return None
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def harmless(text: str) -> str:
    """Return others' text without control sequences."""
    return text.translate(ORDERS)


def dimmed(text: str) -> str:
    """Return a text that a terminal shows in a darker shade."""
    return click.style(text, dim=True)


def note(text: str, quiet: bool = False) -> None:
    """Print a note beside the result on standard error, unless silence is asked for."""
    if not quiet:
        text = _folded(text)
        click.echo(dimmed(text) if can_dim() else text, err=True)


def complain(text: str) -> None:
    """Print an error on standard error."""
    click.echo(_folded(text), err=True)


def _folded(text: str) -> str:
    """Return a text whose lines are no longer than the terminal's, and whose words are whole."""
    columns = width(sys.stderr)
    if columns is None:
        return text
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        fits = len(line) <= columns
        lines += (
            [line]
            if fits
            else textwrap.wrap(
                line,
                columns,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)


class Waiting:
    """Shows at a terminal, after a second, the work inside and its duration.

    The line is gone where the block ends, or by `stop()`.

    Args:
        text: goes on; may be set anew.
        quiet: say nothing.
        after: so many seconds.
    """

    def __init__(self, text: str, quiet: bool = False, after: float = 1.0) -> None:
        self.text = text
        self._shows = not quiet and width(sys.stderr) is not None and can_move()
        self._after = after
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._shows:
            self._thread = threading.Thread(target=self._show, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the line away."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _show(self) -> None:
        started, shown = time.monotonic(), False
        seconds = self._after
        while not self._over.wait(seconds):
            line = f"{self.text}, {time.monotonic() - started:.0f} s"[
                : (width(sys.stderr) or 80) - 1
            ]
            # The next thing that is written begins at the edge, over what is shown here.
            sys.stderr.write(f"{CLEAR}{dimmed(line) if can_dim() else line}\r")
            sys.stderr.flush()
            seconds, shown = 1.0, True
        if shown:
            sys.stderr.write(CLEAR)
            sys.stderr.flush()


@contextmanager
def unechoed() -> Iterator[None]:
    """Hide keys typed meanwhile; they are read with the next line."""
    modes = _modes()
    if modes is None:
        yield
        return
    termios, before = modes
    changed = [*before]
    changed[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)


def _modes() -> tuple[ModuleType, list[Any]] | None:
    """Return the module of terminals and how this one is set, or None if there is either not."""
    try:
        termios = importlib.import_module("termios")
    except ImportError:
        return None
    try:
        return termios, termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, AttributeError, OSError, ValueError):
        return None
