"""Text that grows, in the lines of a terminal: words are not torn at its edge."""

import unicodedata
from collections.abc import Callable
from typing import TextIO

FENCE = "```"
ERASE = "\x1b[K"
TAB = 8


class Wrapped:
    """Writes pieces of a text as they come, and takes a word that does not fit to the next line.

    What stands between fences is written as it is, so that programs can be copied.

    Args:
        out: where to write.
        width: says how long the lines are by now; None to leave all to the terminal.
    """

    def __init__(self, out: TextIO, width: Callable[[], int | None]) -> None:
        self._out = out
        self._width = width
        self._column = 0
        self._word = ""
        self._line = ""
        self._verbatim = False

    def write(self, text: str, style: Callable[[str], str] = str) -> None:
        """Write a piece, looking as `style` makes it."""
        columns = self._width()
        # The last place is left free: a terminal that has filled it is between two lines.
        most = None if columns is None or columns < TAB else columns - 1
        self._out.write(style("".join(self._placed(c, most) for c in text)) if text else "")

    def _placed(self, character: str, most: int | None) -> str:
        """Return the text to write for a character."""
        if character == "\n":
            if self._line.lstrip().startswith(FENCE):
                self._verbatim = not self._verbatim
            self._column, self._word, self._line = 0, "", ""
            return character
        if len(self._line) < TAB:
            self._line += character
        if most is None or self._verbatim or self._line.lstrip().startswith("`"):
            return character
        cells = _cells(character)
        if character.isspace():
            self._word = ""
            if self._column >= most:
                return ""  # the line ends here
            self._column += TAB - self._column % TAB if character == "\t" else cells
            return character
        if cells == 2:
            self._word = ""  # such writing breaks anywhere
        before, width = "", sum(map(_cells, self._word))
        if self._column + cells > most:
            if width < self._column:
                before = "\b" * width + (ERASE if width else "") + "\n" + self._word
                self._column = width
            else:
                self._column -= most + 1  # longer than a line: the terminal goes on
        self._word += character
        self._column += cells
        return before + character


def _cells(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
