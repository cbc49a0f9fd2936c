"""Statistics of an engine, readable at any time."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from quintet.errors import (
    DeadlineError,
    EngineStoppedError,
    NonFiniteError,
    QueueFullError,
    StepFailedError,
)

# Seconds: of a step, and of what a reader waits for.
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
TOKENS = tuple(float(1 << power) for power in range(18))


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram of seconds or tokens.

    Attributes:
        bounds: where one class ends and the next begins.
        counts: how often it was at most as much and more than the bound before; the last of these
            is beyond all bounds.
        total: all together.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """The number of observations."""
        return sum(self.counts)


class Distributing:
    """A growing histogram."""

    __slots__ = ("_bounds", "_counts", "_frozen", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0
        self._frozen: Distribution | None = None

    def add(self, value: float) -> None:
        """Add an observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        self._frozen = None

    def frozen(self) -> Distribution:
        """Return the present histogram."""
        if self._frozen is None:
            self._frozen = Distribution(self._bounds, tuple(self._counts), self._total)
        return self._frozen


_NEVER = Distribution(WAITS, (0,) * (len(WAITS) + 1), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """An engine's state as of its last step, and its totals.

    Attributes:
        rows: how many requests can be under way at once.
        running: how many have a row.
        waiting: how many wait for one.
        held: an estimate of the bytes that rows hold.
        kept: the bytes of what was read before.
        steps: how many forwards there were.
        steps_by_kind: the same by what they did: "decode", "verify" where drafts were checked,
            "chunk" of a prompt.
        generated: how many tokens were made.
        queried: how many tokens of prompts there were.
        cached: how many of them were not read, as they had been before.
        read: how many were; those of texts that came back are among them.
        drafted: how many drafted tokens were checked.
        accepted: how many of them held.
        preempted: how often a row was given back.
        lost: how many rows no request had any more, which is a fault of the engine.
        evicted: how often something that was read before was forgotten for want of room.
        snapshots: how often recurrent states were kept.
        restored: how often a request went on from something that was read before.
        copied: bytes that were copied into rows ("hit") and out of them ("kept").
        finished: how many requests have ended, by how.
        left: how many of them ended as their client left, by how far they were: "waiting" for a
            row, "reading" the prompt or "writing" the answer.
        failed: how many have failed, by `kind_of` the error.
        overhead_seconds: the time of the engine's thread that was no step of the model.
        step_seconds: how long steps took, by kind.
        queue_seconds: how long requests waited for their first row.
        prefill_seconds: how long from there to the first token.
        first_token_seconds: how long from their coming to the first token.
        between_seconds: how long from one step that gave a request tokens to the next.
        decode_seconds: how long from a request's first token to its last.
        whole_seconds: how long from its coming to its last.
        prompt_tokens: how many tokens prompts had, of answers that are whole.
        answer_tokens: how many these had.
    """

    rows: int = 0
    running: int = 0
    waiting: int = 0
    held: int = 0
    kept: int = 0
    steps: int = 0
    steps_by_kind: Mapping[str, int] = field(default_factory=dict)
    generated: int = 0
    queried: int = 0
    cached: int = 0
    read: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    lost: int = 0
    evicted: int = 0
    snapshots: int = 0
    restored: int = 0
    copied: Mapping[str, int] = field(default_factory=dict)
    finished: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    overhead_seconds: float = 0.0
    step_seconds: Mapping[str, Distribution] = field(default_factory=dict)
    queue_seconds: Distribution = _NEVER
    prefill_seconds: Distribution = _NEVER
    first_token_seconds: Distribution = _NEVER
    between_seconds: Distribution = _NEVER
    decode_seconds: Distribution = _NEVER
    whole_seconds: Distribution = _NEVER
    prompt_tokens: Distribution = _NEVER
    answer_tokens: Distribution = _NEVER


def kind_of(error: Exception) -> str:
    """Classify an error by one of a few words."""
    for kind, word in (
        (QueueFullError, "queue_full"),
        (DeadlineError, "deadline"),
        (NonFiniteError, "nonfinite"),
        (StepFailedError, "step"),
        (EngineStoppedError, "stopped"),
    ):
        if isinstance(error, kind):
            return word
    return "request"


class Figures:
    """Counters of an engine; the attributes are those of `Snapshot`."""

    def __init__(self) -> None:
        self.generated = self.queried = self.cached = self.read = 0
        self.drafted = self.accepted = 0
        self.preempted = self.lost = self.snapshots = self.restored = 0
        self.overhead_seconds = 0.0
        self.queue_seconds = Distributing(WAITS)
        self.prefill_seconds = Distributing(WAITS)
        self.first_token_seconds = Distributing(WAITS)
        self.between_seconds = Distributing(STEPS)
        self.decode_seconds = Distributing(WAITS)
        self.whole_seconds = Distributing(WAITS)
        self.prompt_tokens = Distributing(TOKENS)
        self.answer_tokens = Distributing(TOKENS)
        self.left: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()
        self._steps: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._step_seconds: dict[str, Distributing] = {}

    def step(self, kind: str, seconds: float) -> None:
        """Count a step of a kind."""
        self._steps[kind] += 1
        self._step_seconds.setdefault(kind, Distributing(STEPS)).add(seconds)

    def end(self, how: str | Exception) -> None:
        """Count a finished or failed request."""
        if isinstance(how, Exception):
            self._failed[kind_of(how)] += 1
        else:
            self._finished[how] += 1

    def snapshot(
        self, *, rows: int, running: int, waiting: int, held: int, kept: int, evicted: int
    ) -> Snapshot:
        """Return all counters with the present state."""
        return Snapshot(
            rows=rows,
            running=running,
            waiting=waiting,
            held=held,
            kept=kept,
            evicted=evicted,
            steps=self._steps.total(),
            steps_by_kind=dict(self._steps),
            generated=self.generated,
            queried=self.queried,
            cached=self.cached,
            read=self.read,
            drafted=self.drafted,
            accepted=self.accepted,
            preempted=self.preempted,
            lost=self.lost,
            snapshots=self.snapshots,
            restored=self.restored,
            copied=dict(self.copied),
            finished=dict(self._finished),
            left=dict(self.left),
            failed=dict(self._failed),
            overhead_seconds=self.overhead_seconds,
            step_seconds={kind: one.frozen() for kind, one in self._step_seconds.items()},
            queue_seconds=self.queue_seconds.frozen(),
            prefill_seconds=self.prefill_seconds.frozen(),
            first_token_seconds=self.first_token_seconds.frozen(),
            between_seconds=self.between_seconds.frozen(),
            decode_seconds=self.decode_seconds.frozen(),
            whole_seconds=self.whole_seconds.frozen(),
            prompt_tokens=self.prompt_tokens.frozen(),
            answer_tokens=self.answer_tokens.frozen(),
        )
