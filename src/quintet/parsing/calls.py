"""Parses one tool call by its JSON structure."""

import re
from collections.abc import Callable

from quintet.parsing.events import CallArguments, CallEnd, CallStart, Event
from quintet.parsing.format import SEPARATOR, Format
from quintet.parsing.json_value import JsonValue, Unwrapped
from quintet.parsing.source import Steps, TextSource

LONGEST_NAME = 256
_NAME_ENDS = re.compile(r"[\s`{}\[\]\"<\ud800-\udbff]")
_FENCE = "```"


class BrokenCallError(Exception):
    """The text is no valid call."""


class _Call:
    """Builds a call's events in order, name first."""

    def __init__(self, index: int, emit: Callable[[Event], None]) -> None:
        self._index = index
        self._emit = emit
        self._name: str | None = None
        self._started = False
        self._pending: list[str] = []
        self.argued = False

    def name(self, name: str) -> None:
        if not name or len(name) > LONGEST_NAME:
            raise BrokenCallError
        if self._name is None:
            self._name = name
            self._go()

    def argue(self, text: str) -> None:
        if text:
            self._pending.append(text)
            self._go()

    def end(self) -> None:
        if self._name is None:
            raise BrokenCallError
        if not self._started and not self._pending:
            self._pending.append("{}")
        self._go()
        self._emit(CallEnd(self._index))

    def _go(self) -> None:
        if self._name is None or not self._pending:
            return
        if not self._started:
            self._started = True
            self._emit(CallStart(self._index, self._name))
        self._emit(CallArguments(self._index, "".join(self._pending)))
        self._pending.clear()


def read_call(
    source: TextSource, written: Format, index: int, emit: Callable[[Event], None], *, bare: bool
) -> Steps[None]:
    """Read a call behind its marker, through its JSON and code fence.

    Args:
        source: what to read.
        written: how calls are written.
        index: that of the call.
        emit: takes the events, each as soon as it is certain.
        bare: there was no marker; only an object with both members is a call then.

    Raises:
        BrokenCallError: it is no call; what was emitted of it has no end.
    """
    call = _Call(index, emit)
    if written.style == "json":
        fenced = yield from _json_call(source, call)
        if bare and not call.argued:
            raise BrokenCallError
    else:
        fenced = yield from _header_call(source, call, source.marks.sign(written.closes[0]))
    call.end()
    if fenced:
        yield from source.skip_space()
        yield from source.accept(_FENCE)


def _json_call(source: TextSource, call: _Call) -> Steps[bool]:
    """Read an object with name and arguments, in any order."""
    fenced = yield from _fence(source)
    yield from _expect(source, "{")
    following = yield from source.skip_space()
    while following != "}":
        key = yield from _string(source)
        yield from _expect(source, ":")
        yield from source.skip_space()
        if key == "arguments" and not call.argued:
            yield from _arguments(source, call)
        elif key == "name":
            call.name((yield from _string(source)))
        else:
            yield from _value(source, lambda _: None)
        following = yield from source.skip_space()
        if following == ",":
            source.take(source.at + 1)
            following = yield from source.skip_space()
            if following == "}":
                raise BrokenCallError
        elif following != "}":
            raise BrokenCallError
    source.take(source.at + 1)
    return fenced


def _header_call(source: TextSource, call: _Call, closer: str) -> Steps[bool]:
    """Read the name, behind "function" or alone, then the arguments, in a fence or not."""
    first = yield from _word(source)
    yield from source.skip_space()
    if not (yield from source.accept(source.marks.sign(SEPARATOR))):
        raise BrokenCallError
    yield from source.skip_space()
    second = (yield from _word(source)) if first == "function" else ""
    call.name(second or first)
    fenced = yield from _fence(source)
    following = yield from source.skip_space()
    if following in ("{", '"', "n"):
        yield from _arguments(source, call)
    elif not (yield from source.ahead(_FENCE if fenced else closer)):
        raise BrokenCallError
    return fenced


def _arguments(source: TextSource, call: _Call) -> Steps[None]:
    """Read an object, a string that holds one, or null."""
    call.argued = True
    following = yield from source.peek()
    if following == "{":
        yield from _value(source, lambda text: call.argue(source.marks.plain(text)))
    elif following == '"':
        yield from _wrapped(source, call)
    elif following == "n":
        yield from _value(source, lambda _: None)
    else:
        raise BrokenCallError


def _wrapped(source: TextSource, call: _Call) -> Steps[None]:
    """Read arguments encoded as a string."""
    value, unwrapped = JsonValue(), Unwrapped()
    outer = JsonValue()
    outer.push(source.take(source.at + 1))
    other = ""
    while not outer.complete:
        inside = source.take(outer.push(source.text, source.at))
        inside = source.marks.plain(inside[:-1] if outer.complete else inside)
        text = unwrapped.push(inside, last=outer.complete)
        if not other:
            start = text.lstrip() if value.untouched else text
            end = value.push(start) if not value.untouched or start.startswith("{") else 0
            call.argue(start[:end])
            other = start[end:].strip()
        else:
            other += text
        if outer.broken or (not outer.complete and not (yield from source.more())):
            raise BrokenCallError
    begun = not value.untouched
    if other.strip() not in ("" if begun else "null", "") or begun != value.complete:
        raise BrokenCallError


def _value(source: TextSource, sink: Callable[[str], None]) -> Steps[None]:
    """Read a JSON value, passing its text to `sink`."""
    value = JsonValue()
    while True:
        sink(source.take(value.push(source.text, source.at)))
        if value.complete:
            return
        if value.broken or not (yield from source.more()):
            raise BrokenCallError


def _string(source: TextSource) -> Steps[str]:
    """Read a JSON string and return the text it stands for."""
    if (yield from source.peek()) != '"':
        raise BrokenCallError
    pieces: list[str] = []
    yield from _value(source, pieces.append)
    return Unwrapped().push(source.marks.plain("".join(pieces)[1:-1]), last=True)


def _word(source: TextSource) -> Steps[str]:
    """Read an unquoted name, possibly empty."""
    name = ""
    while (letter := (yield from source.peek())) and not _NAME_ENDS.match(letter):
        if len(name) == LONGEST_NAME:
            raise BrokenCallError
        name += source.take(source.at + 1)
    return name


def _fence(source: TextSource) -> Steps[bool]:
    """Read white space and a code fence, if present."""
    if (yield from source.skip_space()) != "`":
        return False
    if not (yield from source.accept(_FENCE)):
        raise BrokenCallError
    while (letter := (yield from source.peek())).isalpha():
        source.take(source.at + len(letter))
    return True


def _expect(source: TextSource, letter: str) -> Steps[None]:
    if (yield from source.skip_space()) != letter:
        raise BrokenCallError
    source.take(source.at + 1)
