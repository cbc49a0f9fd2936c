"""A request, and how its answer reaches the reader."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quintet.errors import NonFiniteError
from quintet.generation.sequence import Sequence as Text
from quintet.generation.speculative.drafting import PredictedDrafting
from quintet.ops.sampling import NothingLeftError
from quintet.serving.answers import Answer, Usage
from quintet.serving.scheduler import Job
from quintet.serving.transcript import Transcript

# What came of requests in one step, each with the one it is for.
News = Sequence[tuple["Request", Answer | Exception]]
Outlet = Callable[[News], None]


def predicts(text: Text) -> bool:
    """Return whether prediction layers draft for a text."""
    return isinstance(text.drafting, PredictedDrafting)


def hand_out(news: News) -> None:
    """Deliver news to readers."""
    for request, one in news:
        request.reader(one)


def hand_over(news: News) -> None:
    """Pass news to the outlets of their requests, grouped by outlet."""
    by_outlet: dict[Outlet, list[tuple[Request, Answer | Exception]]] = {}
    for request, one in news:
        by_outlet.setdefault(request.outlet, []).append((request, one))
    for outlet, its in by_outlet.items():
        outlet(its)


@dataclass(frozen=True, slots=True)
class LoopOutlet:
    """Delivers all news of a step in an event loop."""

    loop: asyncio.AbstractEventLoop

    def __call__(self, news: News) -> None:
        """Schedule the delivery; a closed loop has no readers."""
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
        transcript: turns its tokens into text.
        scope: who may go on from what it read, and whose turn it is.
        salt: only those of the same one, in its scope, may go on from what it read.
        priority: the higher are the last to give their row back.
        deadline: when it is too late to go on.
        arrival: when it came.
        stable: at which tokens of the prompt later ones may go on.

    Attributes:
        cached: how many tokens of the prompt were not read when it began; None before.
        failures: how many forwards failed that it had a part in.
        began: when it got its first row.
        first: when it got its first tokens; None before.
        last: when it got its last ones.
        met: at which tokens of its prompt others part from it.
        ahead: who reads what it begins with, and how much of it, while it waits for that.
        patient: until when it does.
    """

    def __init__(
        self,
        text: Text,
        reader: Callable[[Answer | Exception], None],
        outlet: Outlet,
        transcript: Transcript,
        *,
        scope: str = "",
        salt: str = "",
        priority: int = 0,
        deadline: float | None = None,
        arrival: float = 0.0,
        stable: tuple[int, ...] = (),
    ) -> None:
        super().__init__(
            len(text.ids),
            text.prompt_length + text.max_new_tokens,
            scope=scope,
            priority=priority,
            deadline=deadline,
            arrival=arrival,
            predicts=predicts(text),
        )
        self.text, self.reader, self.outlet, self.transcript = text, reader, outlet, transcript
        self.cached: int | None = None
        self.failures = 0
        self.began = arrival
        self.first: float | None = None
        self.last = arrival
        self.stable = stable
        self.met: set[int] = set()
        self.ahead: tuple[Request, int] | None = None
        self.patient = arrival
        self._sent = len(text.ids)
        self.salt = salt
        self._prompt_sent = self._begun = False

    @property
    def phase(self) -> str:
        """The phase: "waiting", "reading" or "writing"."""
        if self.cached is None:
            return "waiting"
        return "reading" if self.first is None else "writing"

    @property
    def apart(self) -> str:
        """The key, besides the scope, of its prefix cache: adapter and salt."""
        return f"{self.text.adapter_name or ''}\n{self.salt}"

    def follow(self) -> None:
        """Update the progress from the text."""
        self.known, self.computed = len(self.text.ids), self.text.computed

    def news(self) -> Answer | Exception | None:
        """Return the part of the answer that the reader has not seen, or None."""
        text = self.text
        if text.error is not None:
            return _served(text.error)
        ids = tuple(text.ids[self._sent :])
        if not ids and not text.finished:
            return None
        self._sent = len(text.ids)
        if text.finished:
            self.transcript.finish()
        texts = self.transcript.take_texts()
        stop, usage, reason = self.transcript.stop, None, text.finish_reason
        if text.finished or not self._begun:
            usage, self._begun = self._usage(), True
        if text.finished:
            reason = reason if stop is None else "stop"
        logprobs = prompt_logprobs = None
        observed = text.observed
        if observed is not None:
            if observed.logprobs is not None:
                logprobs, observed.new = tuple(observed.new), []
            if observed.prompt_logprobs is not None and not self._prompt_sent:
                prompt_logprobs, observed.prompt = tuple(observed.prompt), []
                self._prompt_sent = True
        return Answer(ids, "".join(texts), reason, usage, texts, logprobs, prompt_logprobs, stop)

    def _usage(self) -> Usage:
        text, drafted, accepted = self.text, 0, 0
        if text.drafting is not None:
            found = text.drafting.found
            drafted, accepted = found.drafted_tokens, found.accepted_tokens
        return Usage(text.prompt_length, self.cached or 0, len(text.new), drafted, accepted)


def _served(error: Exception) -> Exception:
    """Convert an error to the one that readers get."""
    if not isinstance(error, NothingLeftError) or error.best in (None, -math.inf):
        return error
    wrapped = NonFiniteError(str(error))
    wrapped.__cause__ = error
    return wrapped
