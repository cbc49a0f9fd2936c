"""Reuse of prompts: the prefix cache, and waiting for a prompt that another reads."""

from collections.abc import Iterator

from quintet.cache import RowContent
from quintet.generation.engine import Engine as StepEngine
from quintet.ops.device_memory import is_shortage
from quintet.serving.figures import Figures
from quintet.serving.limits import GRID
from quintet.serving.prefix import PrefixCache, common
from quintet.serving.request import Request
from quintet.serving.scheduler import Scheduler

# Recurrent states are kept every so many tokens of a long prompt.
OFTEN = 4096
# So many seconds a request waits for what another reads of the same prompt.
BURST = 1.0


class PromptReuse:
    """Stores row contents in the prefix cache, and finds shared prompts."""

    engine: StepEngine
    scheduler: Scheduler[Request]
    prefix: PrefixCache[RowContent]
    figures: Figures

    def _stops(self, request: Request, found: int) -> tuple[int, ...]:
        """Return the lengths at which to pause a prefill and store its state.

        Keys and values can be from anywhere. Recurrent states can where they are kept: where the
        caller says, where texts were seen to part, and here and there in a long one.
        """
        if self.prefix.divisible:
            return ()
        parts = self.prefix.usable(found, request.text.prompt_length)
        often = range(OFTEN, request.text.prompt_length, OFTEN)
        return tuple(sorted({*request.stable, *often, *request.met, parts} - {0}))

    def _waits(self, request: Request, now: float) -> bool:
        """Return whether a request should wait for a prompt that another is reading."""
        if request.ahead is None:
            ahead = self._ahead_of(request)
            if ahead is None:
                return False
            request.ahead, request.patient = ahead, now + BURST
        other, shared = request.ahead
        reads = other in self.scheduler.running and other.computed < shared
        return reads and now < request.patient and not other.cancelled

    def _ahead_of(self, request: Request) -> tuple[Request, int] | None:
        """Return the request that reads the same prompt, and the shared length."""
        if request.text.watched is not None:
            return None
        for other, shared in self._alike(request):
            if other.computed >= shared:
                continue
            if not self.prefix.divisible:
                # Its state is kept where the two part.
                other.met.add(shared)
                other.stops = tuple(sorted({*other.stops, shared}))
            return other, shared
        return None

    def _alike(self, request: Request) -> Iterator[tuple[Request, int]]:
        """Yield running requests with an uncached shared prompt, and the shared length."""
        ids = request.text.ids
        cached: int | None = None
        for other in self.scheduler.running:
            if (other.scope, other.apart) != (request.scope, request.apart):
                continue
            if other is request or other.text.ids[:GRID] != ids[:GRID]:
                continue
            shared = self.prefix.usable(common(other.text.ids, ids), len(ids))
            if cached is None:
                cached = self.prefix.length(request.scope, ids, request.apart)
            if shared - cached >= GRID:
                yield other, shared

    def _keep_shared(self, request: Request) -> None:
        """Store a running request's content of the same prompt."""
        if self.prefix.divisible:
            for other, shared in self._alike(request):
                if other.text in self.engine.sequences and other.computed >= GRID:
                    self._keep(other, shared)
                    return

    def _keep(self, request: Request, most: int | None = None) -> None:
        """Store a row's content, or its first tokens."""
        text = request.text
        if text.error is not None or (text.observed is not None and text.observed.pooling):
            return

        def extract(start: int, stop: int) -> RowContent:
            content = self.engine.extract(text, start, stop)
            self.figures.copied["kept"] += content.nbytes
            self.figures.snapshots += bool(content.states)
            return content

        length = self.engine.length(text)
        length = length if most is None else min(length, most)
        try:
            self.prefix.keep(request.scope, text.ids[:length], extract, request.apart)
        except Exception as error:
            if not is_shortage(error):
                raise
            self.prefix.clear()
