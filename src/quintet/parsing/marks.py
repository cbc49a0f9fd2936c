"""Markers such as `<tool_call>` in a token stream."""

import re
from collections.abc import Iterable, Mapping

# Halves of surrogate pairs occur in no text that a tokenizer decodes, so each can stand for a
# marker that was a token, and text that only spells the marker stays text.
_SIGNS = range(0xD800, 0xDC00)
_SIGN = re.compile("[\ud800-\udbff]")


class Marks:
    """Inserts signs for marker tokens into text, and removes them again.

    Args:
        tokens: the markers that are tokens of the vocabulary, and their ids.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        signs = {text: chr(code) for text, code in zip(tokens, _SIGNS, strict=False)}
        self._sign_of = signs
        self._text_of = {sign: text for text, sign in signs.items()}
        self._by_token = {token: signs[text] for text, token in tokens.items()}
        # Markers whose text, or the rest of it, is late, and what of the first has come.
        self._owed: list[str] = []
        self._taken = ""

    def sign(self, marker: str) -> str:
        """Return the sign of a marker: the marker itself if it is plain text."""
        return self._sign_of.get(marker, marker)

    def read(self, text: str, token: int) -> str:
        """Return a token's text, or the sign of a marker token."""
        text = self._without_owed(text)
        sign = self._by_token.get(token)
        if sign is None:
            return text
        marker = self._text_of[sign]
        before, found, after = text.rpartition(marker)
        if found:
            return before + sign + after
        # What looks for stop strings may hold a part back; what skips special tokens, all of it.
        begun = _overlap(text, marker)
        self._owed.append(marker[begun:])
        return text[: len(text) - begun] + sign

    def rest(self) -> str:
        """Return text held back as a possible marker."""
        taken, self._taken = self._taken, ""
        return taken

    def plain(self, text: str) -> str:
        """Replace signs by their markers."""
        return _SIGN.sub(lambda found: self._text_of[found[0]], text)

    def _without_owed(self, text: str) -> str:
        while self._owed and text:
            rest = self._owed[0][len(self._taken) :]
            if rest.startswith(text) and rest != text:
                self._taken += text
                return ""
            if not text.startswith(rest):
                # It never comes: the text is another.
                self._owed.clear()
                return self.rest() + text
            del self._owed[0]
            self._taken, text = "", text[len(rest) :]
        return text


def longest_overlap(text: str, markers: Iterable[str]) -> int:
    """Return the number of last characters that may begin one of several markers."""
    return max((_overlap(text, marker) for marker in markers), default=0)


def _overlap(text: str, marker: str) -> int:
    """Return the number of last characters that may begin a marker."""
    most = min(len(text), len(marker) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(marker[:n])), 0)
