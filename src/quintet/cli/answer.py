"""One answer: shown while it is made, its reasoning folded, and kept."""

import sys
import time
from collections.abc import Iterable
from typing import Literal

from quintet.cli.terminal import CLEAR, Waiting, can_dim, can_move, dimmed, harmless, width
from quintet.cli.wrapping import Wrapped
from quintet.parsing.events import Content, Event, Reasoning

# What is shown of a thought: how long it took, all of it, or nothing.
Shown = Literal["fold", "show", "hide"]


class AnswerPrinter:
    """Writes an answer to standard output, and keeps it, also where it is interrupted.

    Attributes:
        waiting: is over with the first token.
        prompt: how many tokens are read for it; None if nobody says.
        tokens: how many it has.
        reading: the seconds to the first token.
        seconds: those to the last.
        thought: what was thought before the answer.
        text: the answer.

    Args:
        reasoning: "fold" says that the model thinks and then for how long, "show" writes it,
            dimmed at a terminal, and "hide" leaves it out.
        quiet: do not say what one waits for.
    """

    def __init__(self, reasoning: Shown, quiet: bool = False) -> None:
        self.waiting = Waiting("reading", quiet)
        self.prompt: int | None = None
        self.tokens = 0
        self.seconds = 0.0
        self.reading = 0.0
        self.thought = ""
        self.text = ""
        self._reasoning = reasoning
        self._started = time.perf_counter()
        at_terminal = sys.stdout.isatty()
        self._shown = harmless if at_terminal else str
        self._dims = at_terminal and can_dim()
        self._folds = at_terminal and can_move()
        self._page = Wrapped(sys.stdout, lambda: width(sys.stdout) if self._folds else None)
        self._status = ""

    def begin(self) -> None:
        """Take the time from here on: it is the model that works."""
        self._started = time.perf_counter()

    def count(self, tokens: int = 1) -> None:
        """Take note of tokens, before their text."""
        if not self.tokens:
            self.waiting.stop()
            self.reading = time.perf_counter() - self._started
        self.tokens += tokens

    def feed(self, events: Iterable[Event]) -> None:
        """Write a piece of the answer, or say that the model thinks."""
        for event in events:
            match event:
                case Reasoning():
                    self.thought += event.text
                    self._think(event.text)
                case Content():
                    if self.thought and not self.text:
                        self._end_thought()
                    self.text += event.text
                    self._page.write(self._shown(event.text))
        sys.stdout.flush()

    def end(self) -> None:
        """Write a line end: this was all."""
        self.waiting.stop()
        if self.thought and not self.text:
            self._end_thought()
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.seconds = time.perf_counter() - self._started

    def _think(self, piece: str) -> None:
        if self._reasoning == "show":
            self._page.write(self._shown(piece), self._dimmed)
        elif self._reasoning == "fold" and self._folds:
            self._status = f"{CLEAR}{self._dimmed(f'thinking, {self.tokens} tokens')}"
            sys.stdout.write(self._status)

    def _end_thought(self) -> None:
        """The answer begins on a line of its own."""
        if self._reasoning == "show":
            self._page.write("\n\n")
        elif self._reasoning == "fold" and sys.stdout.isatty():
            seconds = time.perf_counter() - self._started
            line = self._dimmed(f"thought for {seconds:.1f} s, {self.tokens} tokens")
            sys.stdout.write(f"{CLEAR if self._status else ''}{line}\n")

    def _dimmed(self, text: str) -> str:
        return dimmed(text) if self._dims else text
