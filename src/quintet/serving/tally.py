"""What readers wait for, counted: how often and how long. The engine's thread writes, any reads."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from quintet.errors import DeadlineError, EngineStoppedError, QueueFullError

__all__ = ["Counted", "Histogram", "Marks", "Tally"]

# Upper bounds, in seconds: of what a whole request takes, and of what a token does.
REQUEST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
OVERHEAD = (0.0001, 0.0002, 0.0004, 0.0008, 0.0015, 0.003, 0.006, 0.012, 0.025, 0.05, 0.1)
TOKENS = tuple(float(1 << n) for n in range(18))


@dataclass(frozen=True, slots=True)
class Counted:
    """What a histogram has seen.

    Attributes:
        bounds: up to and with which each count goes.
        counts: one for each bound, and one for what is beyond the last.
        total: of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Histogram:
    """Counts values between fixed bounds.

    Args:
        bounds: in ascending order.
    """

    __slots__ = ("_counts", "_total", "bounds")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self._total += value

    def seen(self) -> Counted:
        """Return what was counted so far."""
        return Counted(self.bounds, tuple(self._counts), self._total)


@dataclass(slots=True)
class Marks:
    """When what happened to a request.

    Attributes:
        arrival: it came.
        admitted: it got its first row.
        first: its first token was made.
        last: its last one so far was.
    """

    arrival: float
    admitted: float | None = None
    first: float | None = None
    last: float | None = None

    @property
    def phase(self) -> str:
        """How far it is: waiting, reading or writing."""
        if self.admitted is None:
            return "waiting"
        return "reading" if self.first is None else "writing"


@dataclass(slots=True)
class Tally:
    """Everything that is counted of an engine's requests.

    Attributes:
        queued: seconds until a row was free.
        reading: seconds from there to the first token.
        writing: seconds from there to the last.
        first: seconds from the request to its first token.
        between: seconds from the tokens of one step to those of the next, of one request.
        whole: seconds from the request to its last token.
        prompts: tokens of prompts.
        answers: tokens of answers.
        steps: seconds of a forward in which each row is given a token or checks its draft.
        pieces: seconds of a forward over a piece of a prompt.
        overhead: seconds of a turn in which no forward ran.
        finished: how many requests ended by themselves, by the reason.
        failed: how many did not, by what was in the way.
        cancelled: how many were of clients that went, by how far they were.
    """

    queued: Histogram = field(default_factory=lambda: Histogram(REQUEST))
    reading: Histogram = field(default_factory=lambda: Histogram(REQUEST))
    writing: Histogram = field(default_factory=lambda: Histogram(REQUEST))
    first: Histogram = field(default_factory=lambda: Histogram(REQUEST))
    between: Histogram = field(default_factory=lambda: Histogram(TOKEN))
    whole: Histogram = field(default_factory=lambda: Histogram(REQUEST))
    prompts: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    answers: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    steps: Histogram = field(default_factory=lambda: Histogram(TOKEN))
    pieces: Histogram = field(default_factory=lambda: Histogram(TOKEN))
    overhead: Histogram = field(default_factory=lambda: Histogram(OVERHEAD))
    finished: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    cancelled: Counter[str] = field(default_factory=Counter)

    def admit(self, marks: Marks, now: float) -> None:
        """Count that a request has a row; one that had to give it back waited once."""
        if marks.admitted is None:
            marks.admitted = now
            self.queued.add(now - marks.arrival)

    def write(self, marks: Marks, now: float) -> None:
        """Count that tokens of a request were made in a step."""
        if marks.last is not None:
            self.between.add(now - marks.last)
        else:
            marks.first = now
            self.first.add(now - marks.arrival)
            if marks.admitted is not None:
                self.reading.add(now - marks.admitted)
        marks.last = now

    def finish(self, marks: Marks, now: float, reason: str, prompt: int, answer: int) -> None:
        """Count that a request ended by itself."""
        self.finished[reason] += 1
        self.whole.add(now - marks.arrival)
        if marks.first is not None:
            self.writing.add(now - marks.first)
        self.prompts.add(prompt)
        self.answers.add(answer)

    def fail(self, error: Exception) -> None:
        """Count that a request did not end by itself."""
        self.failed[_kind(error)] += 1

    def cancel(self, marks: Marks) -> None:
        """Count that the client of a request went."""
        self.cancelled[marks.phase] += 1


def _kind(error: Exception) -> str:
    for kind, name in (
        (QueueFullError, "queue_full"),
        (DeadlineError, "deadline"),
        (EngineStoppedError, "engine_stopped"),
    ):
        if isinstance(error, kind):
            return name
    return "failed"
