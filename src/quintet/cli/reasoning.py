"""What a model thinks before it answers, told apart from the answer while both arrive.

Models such as DeepSeek-R1 write `<think>…</think>` first; the chat template may have written the
beginning already.
"""

from typing import Literal

__all__ = ["Kind", "ReasoningSplitter"]

BEGIN, END = "<think>", "</think>"
Kind = Literal["reasoning", "answer"]


class ReasoningSplitter:
    """Says of each piece of a growing text whether it is reasoning or answer.

    Args:
        prompt: the text the model continues; where its last word begins the reasoning, the text
            starts inside of it.
    """

    def __init__(self, prompt: str = "") -> None:
        inside = prompt.rstrip().endswith(BEGIN)
        # None: the first words will tell.
        self._kind: Kind | None = "reasoning" if inside else None
        self._held = ""
        self._trims = inside

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """Take a further piece, and return what is certain by now."""
        self._held += text
        pieces: list[tuple[Kind, str]] = []
        if self._kind is None:
            start = self._held.lstrip()
            if BEGIN.startswith(start):
                return []
            if start.startswith(BEGIN):
                self._turn("reasoning", start.removeprefix(BEGIN))
            else:
                self._kind = "answer"
        if self._kind == "reasoning" and END in self._held:
            thought, _, rest = self._held.partition(END)
            self._give(pieces, thought.rstrip())
            self._turn("answer", rest)
        certain = len(self._held)
        if self._kind == "reasoning":
            # Space before the end of the reasoning belongs to neither.
            certain = len(self._held[: certain - _overlap(self._held, END)].rstrip())
        ready, self._held = self._held[:certain], self._held[certain:]
        self._give(pieces, ready)
        return pieces

    def flush(self) -> list[tuple[Kind, str]]:
        """Return the text held back, after the last piece."""
        pieces: list[tuple[Kind, str]] = []
        self._give(pieces, self._held)
        self._held = ""
        return pieces

    def _turn(self, kind: Kind, rest: str) -> None:
        self._kind, self._held, self._trims = kind, rest, True

    def _give(self, pieces: list[tuple[Kind, str]], text: str) -> None:
        if self._trims:
            text = text.lstrip("\n")
            self._trims = not text
        if text:
            pieces.append((self._kind or "answer", text))


def _overlap(text: str, tag: str) -> int:
    """Count the last characters that may begin a tag."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
