"""What a finished text says, read slowly and all at once: the reference of the parser."""

import json
import re
from dataclasses import dataclass
from typing import Any

from quintet.parsing import CallArguments, CallEnd, CallStart, Content, Event, Format, Reasoning

Said = list[tuple[Any, ...]]
SPACE = " \t\r\n"


def _refuse(name: str) -> float:
    raise ValueError(name)


_decoder = json.JSONDecoder(parse_constant=_refuse)


def said(events: list[Event]) -> Said:
    """Join neighbouring pieces, and leave out calls that were broken off."""
    ended = {event.index for event in events if isinstance(event, CallEnd)}
    joined: Said = []

    def add(kind: str, text: str) -> None:
        assert text
        if joined and joined[-1][0] == kind:
            text = joined.pop()[1] + text
        joined.append((kind, text))

    for event in events:
        match event:
            case Reasoning(text):
                add("reasoning", text)
            case Content(text):
                add("content", text)
            case CallStart(index, name) if index in ended:
                joined.append(("call", name, ""))
            case CallArguments(index, text) if index in ended:
                kind, name, before = joined.pop()
                joined.append((kind, name, before + text))
    return joined


def merged(events: list[Event]) -> list[Event]:
    """Join neighbouring events of a kind."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content | Reasoning) and type(last) is type(event):
            joined[-1] = type(event)(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            assert last.index == event.index
            joined[-1] = CallArguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined


@dataclass
class Whole:
    """Reads a text in which `marks` are written for the markers."""

    written: Format | None
    marks: dict[str, str]
    parallel: bool = True

    def plain(self, text: str) -> str:
        for marker, mark in self.marks.items():
            text = text.replace(mark, marker)
        return text

    def mark(self, marker: str) -> str:
        return self.marks.get(marker, marker)

    def read(self, text: str, opening: str) -> Said:
        said: Said = []
        think, end = self.mark("<think>"), self.mark("</think>")
        if opening == "unknown" and text.lstrip(SPACE).startswith(think):
            text, opening = text.lstrip(SPACE).removeprefix(think), "reasoning"
        if opening == "reasoning":
            thought, found, rest = text.partition(end)
            thought = (thought.rstrip() if found else thought).lstrip("\n")
            if self.plain(thought):
                said.append(("reasoning", self.plain(thought)))
            text = rest.lstrip("\n")
        return said + self.answer(text)

    def answer(self, text: str) -> Said:
        """Cut the text into calls and what is between them."""
        if self.written is None:
            return [("content", self.plain(text))] if text else []
        opens = [self.mark(marker) for marker in self.written.opens]
        closes = [self.mark(marker) for marker in self.written.closes]
        invents = [self.mark(marker) for marker in self.written.invents]
        anything = re.compile("|".join(map(re.escape, [*opens, *closes, *invents])))
        parts: list[Any] = [""]
        at, closing, over = 0, set(), False
        if self.written.bare and text.lstrip(SPACE)[:1] in ("{", "`"):
            start = len(text) - len(text.lstrip(SPACE))
            if call := self.calls(text, start, bare=True):
                at = call[1]
                parts = [text[:start], *call[0], ""]
                closing = set()
                over = not self.parallel
        while not over:
            found = anything.search(text, at)
            parts[-1] += text[at : found.start() if found else len(text)]
            if found is None:
                break
            mark, at = found[0], found.end()
            if mark in invents:
                over = True
            elif mark in closing:
                closing.discard(mark)
            elif mark in opens:
                if call := self.opened(text, mark, at):
                    parts += [*call[0], ""]
                    at, closing = call[1], set(closes)
                    over = not self.parallel
                else:
                    parts[-1] += mark
                    closing = set()
            else:
                parts[-1] += mark
        return self.tidy(parts, over)

    def tidy(self, parts: list[Any], over: bool) -> Said:
        """Take the space beside calls away."""
        said: Said = []
        for index, part in enumerate(parts):
            if not isinstance(part, str):
                said.append(part)
                continue
            text = self.plain(part)
            if index > 0:
                text = text.lstrip()
            if index + 1 < len(parts) or over:
                text = text.rstrip()
            if text:
                said.append(("content", text))
        return said

    def opened(self, text: str, mark: str, at: int) -> tuple[Said, int] | None:
        assert self.written is not None
        if self.written.style == "json":
            return self.calls(text, at, bare=False)
        section, each = map(self.mark, self.written.opens)
        if mark == section:
            at = len(text) - len(text[at:].lstrip(SPACE))
            if not text.startswith(each, at):
                return None
            at += len(each)
        try:
            name, arguments, at = self.header(text, at)
        except ValueError:
            return None
        return [("call", name, arguments)], at

    def calls(self, text: str, at: int, *, bare: bool) -> tuple[Said, int] | None:
        """Read one object after the other."""
        found: Said = []
        while True:
            try:
                name, arguments, end = self.object(text, at, bare)
            except ValueError:
                return (found, at) if found else None
            found.append(("call", name, arguments))
            rest = text[end:].lstrip(SPACE)
            at = len(text) - len(rest)
            if not rest.startswith("{") or not self.parallel:
                return found, at

    def object(self, text: str, at: int, bare: bool) -> tuple[str, str, int]:
        at, fenced = self.fence(text, at)
        value, end = decode(text, at)
        if not isinstance(value, dict):
            raise ValueError("no object")
        name = arguments = None
        for key, start, stop, value in members(text, at):
            if key == "name":
                if not isinstance(value, str) or not value or len(self.plain(value)) > 256:
                    raise ValueError("no name")
                name = self.plain(value) if name is None else name
            elif key == "arguments" and arguments is None:
                arguments = self.arguments(text[start:stop], value)
        if name is None or (bare and arguments is None):
            raise ValueError("a member is missing")
        return name, arguments or "{}", self.unfence(text, end) if fenced else end

    def header(self, text: str, at: int) -> tuple[str, str, int]:
        word = re.compile(r'[^\s`{}\[\]"<\ud800-\udbff\ue000-\uf8ff]{0,256}')
        separator = self.mark("<｜tool▁sep｜>")
        first = word.match(text, at)[0]  # type: ignore[index]
        rest = text[at + len(first) :].lstrip(SPACE)
        if not rest.startswith(separator):
            raise ValueError("no separator")
        rest = rest.removeprefix(separator).lstrip(SPACE)
        second = word.match(rest)[0] if first == "function" else ""  # type: ignore[index]
        name = second or first
        if not name:
            raise ValueError("no name")
        at = len(text) - len(rest) + len(second)
        at, fenced = self.fence(text, at)
        rest = text[at:]
        closer = "```" if fenced else self.mark("<｜tool▁call▁end｜>")
        if rest[:1] in ("{", '"', "n") and rest:
            value, end = decode(text, at)
            arguments = self.arguments(text[at:end], value)
        elif rest.startswith(closer):
            arguments, end = "{}", at
        else:
            raise ValueError("no arguments")
        return name, arguments, self.unfence(text, end) if fenced else end

    def arguments(self, raw: str, value: Any) -> str:
        if isinstance(value, str):
            inner = self.plain(value)
            if inner.strip() in ("", "null"):
                return "{}"
            inner = inner.lstrip()
            parsed, end = decode(inner, 0)
            if not isinstance(parsed, dict) or inner[end:].strip():
                raise ValueError("no arguments")
            return inner[:end]
        if value is None:
            return "{}"
        if not isinstance(value, dict):
            raise ValueError("no arguments")
        return self.plain(raw)

    def fence(self, text: str, at: int) -> tuple[int, bool]:
        rest = text[at:].lstrip(SPACE)
        if not rest.startswith("`"):
            return len(text) - len(rest), False
        if not rest.startswith("```"):
            raise ValueError("no fence")
        rest = rest[3:]
        while rest and rest[0].isalpha():
            rest = rest[1:]
        rest = rest.lstrip(SPACE)
        return len(text) - len(rest), True

    def unfence(self, text: str, at: int) -> int:
        rest = text[at:].lstrip(SPACE)
        return len(text) - len(rest.removeprefix("```"))


def decode(text: str, at: int) -> tuple[Any, int]:
    value, end = _decoder.raw_decode(text[at:])
    return value, at + end


def members(text: str, at: int) -> list[tuple[str, int, int, Any]]:
    """Return the members of an object that is one, with where their values stand."""
    found = []
    at += 1
    while True:
        at = skip(text, at)
        if text[at] == "}":
            return found
        key, at = decode(text, at)
        at = skip(text, skip(text, at) + 1)
        value, end = decode(text, at)
        found.append((key, at, end, value))
        at = skip(text, end)
        if text[at] == ",":
            at += 1


def skip(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip(SPACE))
