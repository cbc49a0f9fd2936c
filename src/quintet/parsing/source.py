"""A text stream that parsers wait on."""

import re
from collections.abc import Generator
from typing import TypeVar

from quintet.parsing.marks import Marks, longest_overlap

_Result = TypeVar("_Result")
# A parser is a generator: it yields where it waits for text.
Steps = Generator[None, None, _Result]

_SPACE = re.compile(r"[ \t\r\n]*")


class TextSource:
    """Text that has arrived and was not read."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.text = ""
        self.at = 0
        self.ended = False
        self._record: list[str] | None = None

    def add(self, text: str) -> None:
        """Append text."""
        self.text = self.text[self.at :] + text
        self.at = 0

    def record(self, read: str = "") -> None:
        """Start recording the text that is read."""
        self._record = [read]

    def recorded(self) -> str:
        """Return the recording, and stop."""
        text = "".join(self._record or [])
        self._record = None
        return text

    def take(self, end: int) -> str:
        """Read up to an index."""
        taken = self.text[self.at : end]
        self.at = end
        if self._record is not None:
            self._record.append(taken)
        return taken

    def more(self) -> Steps[bool]:
        """Wait for more text; return False at the end."""
        available = len(self.text) - self.at
        while len(self.text) - self.at == available:
            if self.ended:
                return False
            yield
        return True

    def peek(self) -> Steps[str]:
        """Return the next character without reading it; "" at the end."""
        while self.at == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def skip_space(self) -> Steps[str]:
        """Read white space; return the next character without reading it."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found is not None
            self.take(found.end())
            following = yield from self.peek()
            if not following or following not in " \t\r\n":
                return following

    def ahead(self, literal: str) -> Steps[bool]:
        """Return whether a text comes next, without reading."""
        while True:
            start = self.text[self.at : self.at + len(literal)]
            if start == literal:
                return True
            if not literal.startswith(start) or not (yield from self.more()):
                return False

    def accept(self, literal: str) -> Steps[bool]:
        """Read a text if it comes next; return whether it did."""
        comes = yield from self.ahead(literal)
        if comes:
            self.take(self.at + len(literal))
        return comes

    def until(self, pattern: re.Pattern[str], signs: tuple[str, ...]) -> Steps[tuple[str, str]]:
        """Read on, and return text that is certain with "", or the last of it with a sign.

        Both are "" at the end. `pattern` finds the signs.
        """
        while True:
            if found := pattern.search(self.text, self.at):
                before = self.take(found.start())
                return before, self.take(found.end())
            certain = len(self.text) - longest_overlap(self.text[self.at :], signs)
            if certain > self.at:
                return self.take(certain), ""
            if not (yield from self.more()):
                return self.take(len(self.text)), ""
