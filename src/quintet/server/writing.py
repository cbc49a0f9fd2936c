"""Answers of protocols whose events put a whole together: written as it is heard."""

import json
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from quintet.parsing.events import Event
from quintet.server.events import ServerEvent
from quintet.server.questions import Finish, Heard, Prompted, Start, TokenScore

Wire = dict[str, Any]


class Writer(Protocol):
    """Puts an answer together, and says by what events it is told of."""

    def begin(self) -> list[Wire]:
        """Return the events before anything is written."""
        ...

    def write(self, event: Event, scores: Iterable[TokenScore] = ()) -> list[Wire]:
        """Take one thing the model does, with how likely the tokens of its text were."""
        ...

    def finish(self, finish: Finish) -> list[Wire]:
        """Return the last events."""
        ...


async def written(
    heard: AsyncGenerator[Heard, None], writer: Writer
) -> AsyncGenerator[ServerEvent, None]:
    """Yield the events of an answer, by the names of their types."""
    for event in writer.begin():
        yield named(event)
    async with aclosing(heard):
        async for one in heard:
            for event in _taken(one, writer):
                yield named(event)


async def finished(heard: AsyncGenerator[Heard, None], writer: Writer) -> None:
    """Have a writer put a whole answer together."""
    async with aclosing(heard):
        async for one in heard:
            _taken(one, writer)


def named(event: Mapping[str, Any]) -> ServerEvent:
    """Return an event as it is sent, by the name of its type."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return ServerEvent(data, event["type"])


def _taken(heard: Heard, writer: Writer) -> list[Wire]:
    match heard.event:
        case Finish():
            return writer.finish(heard.event)
        case Start() | Prompted():
            return []
        case event:
            return writer.write(event, heard.scores)
