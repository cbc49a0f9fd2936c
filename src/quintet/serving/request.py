"""What was asked for once, and how its answer reaches whoever waits for it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quintet.generation.sequence import Sequence as Text
from quintet.serving.scheduler import Job
from quintet.tokenization.stream import IncrementalDecoder

__all__ = ["Answer", "LoopOutlet", "Outlet", "Request", "Usage", "hand_out"]


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a request took.

    Attributes:
        prompt: of the prompt.
        cached: of these, those that were read before, for another request.
        completion: that were generated.
    """

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What was added to an answer.

    Attributes:
        ids: the tokens.
        text: theirs, as far as later ones cannot change it; "" without a tokenizer.
        finish_reason: "stop" or "length" with the last of them; None while it goes on.
        usage: with the last of them.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None
    usage: Usage | None = None


# What came of requests in one step, each with the one it is for.
News = Sequence[tuple["Request", Answer | Exception]]
Outlet = Callable[[News], None]


def hand_out(news: News) -> None:
    """Give each reader what is for it."""
    for request, one in news:
        request.reader(one)


@dataclass(frozen=True, slots=True)
class LoopOutlet:
    """Hands out in an event loop, all of a step at once."""

    loop: asyncio.AbstractEventLoop

    def __call__(self, news: News) -> None:
        """Let the loop hand out; a loop that is closed has no readers any more."""
        try:
            self.loop.call_soon_threadsafe(hand_out, news)
        except RuntimeError:
            for request, _ in news:
                request.cancelled = True


class Request(Job):
    """A job with its text and its reader.

    Args:
        text: what is generated.
        reader: takes what comes of it.
        outlet: hands it to the reader, and others theirs; called in the engine's thread.
        decoder: turns tokens into text; None for ids alone.
        scope: who may go on from what it read, and whose turn it is.
        priority: the higher are the last to give their row back.
        deadline: when it is too late to go on.
        arrival: when it came.
        stable: how many tokens of the prompt the next one will begin with, too; 0 if unknown.
    """

    def __init__(
        self,
        text: Text,
        reader: Callable[[Answer | Exception], None],
        outlet: Outlet,
        decoder: IncrementalDecoder | None,
        *,
        scope: str,
        priority: int,
        deadline: float | None,
        arrival: float,
        stable: int,
    ) -> None:
        super().__init__(
            len(text.ids),
            text.prompt_length + text.room,
            scope=scope,
            priority=priority,
            deadline=deadline,
            arrival=arrival,
            stops=(stable,) if stable else (),
        )
        self.text, self.reader, self.outlet, self.decoder = text, reader, outlet, decoder
        self.cached: int | None = None
        self.failures = 0
        self._told = len(text.ids)

    def follow(self) -> None:
        """Take over how far its text is."""
        self.known, self.computed = len(self.text.ids), self.text.computed

    def news(self) -> Answer | Exception | None:
        """Return what its reader has not been told, or None where there is nothing."""
        text = self.text
        if text.error is not None:
            return text.error
        ids = tuple(text.ids[self._told :])
        self._told = len(text.ids)
        shown = ""
        if self.decoder is not None:
            shown = self.decoder.push(list(ids))
        if not text.finished:
            return Answer(ids, shown) if ids else None
        if self.decoder is not None:
            shown += self.decoder.flush()
        usage = Usage(text.prompt_length, self.cached or 0, len(text.new))
        return Answer(ids, shown, text.finish_reason, usage)
