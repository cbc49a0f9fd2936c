"""Incremental recognition of one JSON value."""

import json
import re
from typing import Literal

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SPACE = re.compile(r"[ \t\n\r]*")
_HEX = frozenset("0123456789abcdefABCDEF")
_ESCAPED = frozenset('"\\/bfnrt')
_WORDS = ("true", "false", "null")
_DIGITS = "0123456789"
# What may follow in a number, and whether it may end there.
_NUMBER: dict[str, dict[str, str]] = {
    "sign": {"0": "zero", **dict.fromkeys(_DIGITS[1:], "whole")},
    "zero": {".": "point", "e": "e", "E": "e"},
    "whole": {".": "point", "e": "e", "E": "e", **dict.fromkeys(_DIGITS, "whole")},
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {"e": "e", "E": "e", **dict.fromkeys(_DIGITS, "fraction")},
    "e": {"+": "power sign", "-": "power sign", **dict.fromkeys(_DIGITS, "power")},
    "power sign": dict.fromkeys(_DIGITS, "power"),
    "power": dict.fromkeys(_DIGITS, "power"),
}
_NUMBER_ENDS = frozenset(["zero", "whole", "fraction", "power"])
_FIRST = {"-": "sign", "0": "zero", **dict.fromkeys(_DIGITS[1:], "whole")}

_Expects = Literal["value", "first item", "first key", "key", "colon", "more"]


class JsonValue:
    """Recognises a JSON value (RFC 8259) in pieces.

    `complete` says that it ended, `broken` that what came is the beginning of none. A number ends
    with what follows it, or with `end`.
    """

    def __init__(self) -> None:
        self.complete = False
        self.broken = False
        self._open: list[Literal["{", "["]] = []
        self._expects: _Expects = "value"
        self._inside: Literal["", "string", "escape", "number", "word"] = ""
        self._is_key = False
        self._rest = ""
        self._hex_left = 0
        self._number = ""

    @property
    def untouched(self) -> bool:
        """Whether nothing was read."""
        return self._expects == "value" and not self._inside and not self._open

    def push(self, text: str, at: int = 0) -> int:
        """Read text from an index; return the index behind the value."""
        while at < len(text) and not self.complete and not self.broken:
            match self._inside:
                case "string":
                    at = self._string(text, at)
                case "escape":
                    at = self._escape(text, at)
                case "number":
                    at = self._digits(text, at)
                case "word":
                    at = self._word(text, at)
                case _:
                    at = self._between(text, at)
        return at

    def end(self) -> bool:
        """Signal the end; return whether the value is complete."""
        if self._inside == "number" and self._number in _NUMBER_ENDS and not self._open:
            self.complete = True
        return self.complete

    def _between(self, text: str, at: int) -> int:
        found = _SPACE.match(text, at)
        assert found is not None
        at = found.end()
        if at == len(text):
            return at
        letter = text[at]
        match self._expects:
            case "value":
                return self._begin(letter, at)
            case "first item" if letter != "]":
                return self._begin(letter, at)
            case "first key" | "key" if letter == '"':
                self._inside, self._is_key = "string", True
                return at + 1
            case "colon" if letter == ":":
                self._expects = "value"
                return at + 1
            case "more" if letter == ",":
                self._expects = "key" if self._open[-1] == "{" else "value"
                return at + 1
            case "first item" | "first key" | "more" if letter == _CLOSING[self._open[-1]]:
                self._open.pop()
                self._ended()
                return at + 1
        self.broken = True
        return at

    def _begin(self, letter: str, at: int) -> int:
        if letter == "{":
            self._open.append("{")
            self._expects = "first key"
        elif letter == "[":
            self._open.append("[")
            self._expects = "first item"
        elif letter == '"':
            self._inside, self._is_key = "string", False
        elif letter in _FIRST:
            self._inside, self._number = "number", _FIRST[letter]
        elif word := next((word for word in _WORDS if word[0] == letter), None):
            self._inside, self._rest = "word", word[1:]
        else:
            self.broken = True
            return at
        return at + 1

    def _string(self, text: str, at: int) -> int:
        found = _PLAIN.match(text, at)
        assert found is not None
        at = found.end()
        if at == len(text):
            return at
        if text[at] == '"':
            self._inside = ""
            if self._is_key:
                self._expects = "colon"
            else:
                self._ended()
        elif text[at] == "\\":
            self._inside, self._hex_left = "escape", 0
        else:
            self.broken = True
            return at
        return at + 1

    def _escape(self, text: str, at: int) -> int:
        letter = text[at]
        if self._hex_left:
            self.broken = letter not in _HEX
            self._hex_left -= 1
        elif letter == "u":
            self._hex_left = 4
        else:
            self.broken = letter not in _ESCAPED
        if self.broken:
            return at
        if not self._hex_left:
            self._inside = "string"
        return at + 1

    def _digits(self, text: str, at: int) -> int:
        while at < len(text) and (following := _NUMBER[self._number].get(text[at])):
            self._number = following
            at += 1
        if at < len(text):
            if self._number in _NUMBER_ENDS:
                self._inside = ""
                self._ended()
            else:
                self.broken = True
        return at

    def _word(self, text: str, at: int) -> int:
        if text[at] != self._rest[0]:
            self.broken = True
            return at
        self._rest = self._rest[1:]
        if not self._rest:
            self._inside = ""
            self._ended()
        return at + 1

    def _ended(self) -> None:
        self._expects = "more"
        self.complete = not self._open


_CLOSING = {"{": "}", "[": "]"}

_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_UNITS = re.compile(
    rf"(?:[^\\]+|{_HIGH}{_LOW}|(?!{_HIGH})\\u.{{4}}|\\[^u]|{_HIGH}(?=.{{6}}))*", re.S
)
_LONE = re.compile("[\ud800-\udfff]")


class Unwrapped:
    """Decodes the inside of a JSON string in pieces."""

    def __init__(self) -> None:
        self._pending = ""

    def push(self, inside: str, *, last: bool = False) -> str:
        """Return the decoded text that is final."""
        self._pending += inside
        found = _UNITS.match(self._pending)
        assert found is not None
        certain = len(self._pending) if last else found.end()
        ready, self._pending = self._pending[:certain], self._pending[certain:]
        # Half of a pair is no character and could not be sent to anybody.
        return _LONE.sub("\ufffd", json.loads(f'"{ready}"', strict=False)) if ready else ""
