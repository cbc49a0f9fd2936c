"""The streaming parser: reasoning, then content with tool calls."""

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from quintet.parsing.calls import BrokenCallError, read_call
from quintet.parsing.events import CallEnd, CallStart, Content, Event, Reasoning
from quintet.parsing.format import END_THINK, THINK, Format
from quintet.parsing.marks import Marks
from quintet.parsing.source import Steps, TextSource

# Where a text begins: inside of the reasoning, behind it, or its first words will tell.
Opening = Literal["reasoning", "content", "unknown"]


class StreamParser:
    """Splits streamed text into events, however it is cut.

    Reading a text takes time in proportion to its length, and no more than is uncertain is held
    back. A call whose JSON is broken, or never ends, is content, in the words it had.

    Args:
        tokens: the markers that are tokens, and their ids; others are known by their text.
        written: how calls are written; None if nothing is a call.
        opening: where the text begins.
        parallel: take further calls after the first; otherwise nothing is wanted then.

    Attributes:
        broken: how many texts began as a call and are content.
    """

    def __init__(
        self, tokens: Mapping[str, int], written: Format | None, opening: Opening, parallel: bool
    ) -> None:
        self._marks = Marks(tokens)
        self._source = TextSource(self._marks)
        self._written = written
        self._opening: Opening = opening
        self._parallel = parallel
        self._events: list[Event] = []
        self._calls = 0
        self.broken = 0
        self._done = False
        # Space at the end of the content so far: beside a call it belongs to neither.
        self._spaces: list[str] = []
        self._trims: Literal["", "lines", "space"] = ""
        self._steps = self._parse()
        self._over = False

    @property
    def done(self) -> bool:
        """Whether generation should end."""
        return self._done

    def feed(self, text: str, token: int) -> list[Event]:
        """Add a token and its text; return the events that are final."""
        if self._over:
            return []
        self._source.add(self._marks.read(text, token))
        return self._go()

    def flush(self) -> list[Event]:
        """Return the remaining events at the end."""
        self._source.add(self._marks.rest())
        self._source.ended = True
        return [] if self._over else self._go()

    def _go(self) -> list[Event]:
        try:
            next(self._steps)
        except StopIteration:
            self._over = True
        events, self._events = self._events, []
        return events

    def _parse(self) -> Steps[None]:
        if self._opening == "unknown":
            yield from self._open()
        if self._opening == "reasoning":
            yield from self._think()
        yield from self._answer()

    def _open(self) -> Steps[None]:
        """Detect whether the text begins with reasoning."""
        self._source.record()
        yield from self._source.skip_space()
        if (yield from self._source.accept(self._marks.sign(THINK))):
            self._opening = "reasoning"
            self._source.recorded()
        else:
            self._emit_content(self._source.recorded())

    def _think(self) -> Steps[None]:
        """Read reasoning up to its end."""
        end = self._marks.sign(END_THINK)
        pattern = re.compile(re.escape(end))
        spaces, begun, found = "", False, ""
        while not found:
            text, found = yield from self._source.until(pattern, (end,))
            if not text and not found:
                break
            text = spaces + text if begun else (spaces + text).lstrip("\n")
            body = text.rstrip()
            spaces = text[len(body) :]
            if body:
                begun = True
                self._events.append(Reasoning(self._marks.plain(body)))
        if not found and spaces:
            self._events.append(Reasoning(spaces))
        self._trims = "lines"

    def _answer(self) -> Steps[None]:
        """Read content and calls up to the end."""
        written = self._written
        opens, closes, invents = self._signs()
        every = (*opens, *closes, *invents)
        # Where there are no signs, a pattern that finds nothing.
        pattern = re.compile("|".join(map(re.escape, every)) or "(?!)")
        # The markers behind a call may be left out, and are text where no call is before them.
        closing: set[str] = set()
        if written is not None and written.bare and (yield from self._looks_like_a_call()):
            yield from self._call(written, "")
        while not self._done:
            text, found = yield from self._source.until(pattern, every)
            self._emit_content(text)
            if not text and not found:
                break
            if found in invents:
                self._done = True
            elif found in closing:
                closing.discard(found)
            elif found in opens and written is not None:
                closing = set(closes) if (yield from self._call(written, found)) else set()
            else:
                self._emit_content(found)
        if self._spaces and not self._done:
            self._events.append(Content("".join(self._spaces)))

    def _signs(self) -> Iterator[tuple[str, ...]]:
        """Yield the signs that begin and end calls, and begin results."""
        used = self._written
        for markers in (used.opens, used.closes, used.invents) if used else ((), (), ()):
            yield tuple(self._marks.sign(marker) for marker in markers)

    def _looks_like_a_call(self) -> Steps[bool]:
        self._source.record()
        following = yield from self._source.skip_space()
        self._emit_content(self._source.recorded())
        return following in ("{", "`")

    def _call(self, written: Format, opener: str) -> Steps[bool]:
        """Read the text behind a marker; return whether it was a call."""
        self._source.record(opener)
        section, opening = written.opens[0], written.opens[-1]
        if written.style == "header" and opener == self._marks.sign(section):
            yield from self._source.skip_space()
            if not (yield from self._source.accept(self._marks.sign(opening))):
                self._emit_content(self._source.recorded())
                return False
        complete = 0
        while True:
            try:
                yield from read_call(
                    self._source, written, self._calls, self._note, bare=not opener
                )
            except BrokenCallError:
                # Text in JSON that no marker begins only looked like one.
                self.broken += bool(opener)
                self._emit_content(self._source.recorded())
                break
            complete += 1
            self._source.recorded()
            # Some models put several objects between two markers.
            if self._done or written.style != "json":
                break
            if (yield from self._source.skip_space()) != "{":
                break
            self._source.record()
        return complete > 0

    def _note(self, event: Event) -> None:
        if isinstance(event, CallStart):
            self._calls += 1
        elif isinstance(event, CallEnd):
            self._spaces.clear()
            self._trims = "space"
            self._done = not self._parallel
        self._events.append(event)

    def _emit_content(self, text: str) -> None:
        text = self._marks.plain(text)
        if self._trims:
            text = text.lstrip("\n" if self._trims == "lines" else None)
        if not text:
            return
        self._trims = ""
        body = text.rstrip() if self._written is not None else text
        if body:
            self._events.append(Content("".join([*self._spaces, body])))
            self._spaces = []
        if body != text:
            self._spaces.append(text[len(body) :])
