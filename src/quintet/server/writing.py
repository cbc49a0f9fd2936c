"""Writers of answers for protocols with event streams."""

import json
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from quintet.parsing.events import Event
from quintet.server.events import ServerEvent
from quintet.server.questions import AnswerEvent, Finish, Prompted, Start, TokenScore

Wire = dict[str, Any]


class EventWriter(Protocol):
    """Builds an answer and its events."""

    def begin(self) -> list[Wire]:
        """Return the opening events."""
        ...

    def write(self, event: Event, scores: Iterable[TokenScore] = ()) -> list[Wire]:
        """Add one event of the model, with token scores."""
        ...

    def finish(self, finish: Finish) -> list[Wire]:
        """Return the closing events."""
        ...


async def written(
    events: AsyncGenerator[AnswerEvent, None], writer: EventWriter
) -> AsyncGenerator[ServerEvent, None]:
    """Yield the events of an answer with their types."""
    for event in writer.begin():
        yield named(event)
    async with aclosing(events):
        async for one in events:
            for event in _taken(one, writer):
                yield named(event)


async def finished(events: AsyncGenerator[AnswerEvent, None], writer: EventWriter) -> None:
    """Build a whole answer with a writer."""
    async with aclosing(events):
        async for one in events:
            _taken(one, writer)


def named(event: Mapping[str, Any]) -> ServerEvent:
    """Return an event named by its type."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return ServerEvent(data, event["type"])


def _taken(answer_event: AnswerEvent, writer: EventWriter) -> list[Wire]:
    match answer_event.event:
        case Finish():
            return writer.finish(answer_event.event)
        case Start() | Prompted():
            return []
        case event:
            return writer.write(event, answer_event.scores)
