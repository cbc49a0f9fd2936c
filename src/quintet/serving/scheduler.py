"""The scheduler: plans each step; plain Python without torch.

A job is what was asked for once. It has no phase: `computed` catches up with `known`, the tokens of
its prompt and answer so far, of which the last is run over to make the next.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from quintet.errors import QueueFullError
from quintet.serving.limits import Limits
from quintet.serving.pace import LEAST_TAIL, Pace

KEEPS_AFTER = 3
# So many that came later may get a row before one that has no room yet.
PASSES = 8


@dataclass(frozen=True, slots=True)
class RowCost:
    """The bytes of rows.

    Attributes:
        row: of a row without tokens.
        token: of each of its tokens.
        drafted: of each of them besides, where prediction layers draft.
        unread: of each that these have yet to read, as they do when the prompt is done.
    """

    row: int
    token: int
    drafted: int = 0
    unread: int = 0

    def of(self, tokens: int) -> int:
        """Return the bytes of a row of this many tokens."""
        return self.row + self.token * tokens

    @property
    def drafting(self) -> "RowCost":
        """The maximum cost of a row that prediction layers draft for."""
        return RowCost(self.row, self.token + self.drafted + self.unread)


class Job:
    """The scheduler's view of a request.

    Attributes:
        scope: whose it is; those of one scope share what is everybody's.
        known: how many tokens of prompt and answer there are.
        computed: how many of them were run over.
        most: how many tokens there can be.
        priority: the higher are the last to give their row back.
        deadline: when it is too late to go on; None for never.
        arrival: when it came.
        stops: at which tokens a piece of the prompt has to end.
        predicts: prediction layers draft for it, and keep what they need.
        cancelled: nobody waits for it any more.
        preemptions: how often it had to give its row back.
        passed: how many got a row before it since it was its turn and there was no room for it.
    """

    __slots__ = (
        "arrival", "cancelled", "computed", "deadline", "known", "most", "passed", "predicts",
        "preemptions", "priority", "scope", "stops",
    )  # fmt: skip

    def __init__(
        self,
        known: int,
        most: int,
        *,
        scope: str = "",
        priority: int = 0,
        deadline: float | None = None,
        arrival: float = 0.0,
        stops: tuple[int, ...] = (),
        predicts: bool = False,
    ) -> None:
        self.known, self.most, self.computed = known, most, 0
        self.predicts = predicts
        self.scope, self.priority, self.deadline = scope, priority, deadline
        self.arrival, self.stops = arrival, stops
        self.cancelled = False
        self.preemptions = self.passed = 0

    @property
    def steps(self) -> bool:
        """Whether only its last token remains to be run."""
        return self.known - self.computed == 1


J = TypeVar("J", bound=Job)


@dataclass(slots=True)
class StepPlan(Generic[J]):
    """The work of the next step, in this order.

    Attributes:
        drop: jobs that are over before their end, by cancelling or by the clock.
        preempt: jobs that give their row back and wait again, in front.
        admit: jobs that get one.
        step: jobs that each get a token, or several.
        read: a job that reads on in its prompt, by a piece; `reading` tells who does beside it.
    """

    drop: list[J] = field(default_factory=list)
    preempt: list[J] = field(default_factory=list)
    admit: list[J] = field(default_factory=list)
    step: list[J] = field(default_factory=list)
    read: J | None = None

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.drop or self.preempt or self.admit or self.step or self.read)


class Scheduler(Generic[J]):
    """First come, first served within a scope; fair between scopes.

    Args:
        limits: how much at once.
        cost: what rows hold.
        waits: tells whether a job had better wait for what another is about to have read.
    """

    def __init__(
        self,
        limits: Limits,
        cost: RowCost,
        waits: Callable[[J, float], bool] = lambda job, now: False,
    ) -> None:
        self.limits, self.cost, self._waits = limits, cost, waits
        self.pace = Pace(limits)
        self.running: list[J] = []
        self._waiting: dict[str, deque[J]] = {}
        # Seconds of the engine that each scope has had, of those that are here.
        self._had: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.running) + self.queued

    @property
    def queued(self) -> int:
        """The number of jobs waiting for a row."""
        return sum(map(len, self._waiting.values()))

    def all(self) -> list[J]:
        """Return running and waiting jobs."""
        return [*self.running, *(job for queue in self._waiting.values() for job in queue)]

    def submit(self, job: J) -> None:
        """Queue a job.

        Raises:
            QueueFullError: as many wait as may.
        """
        leaving = sum(one.cancelled for one in self.all())
        if self.queued >= self.limits.queue + self._free + leaving:
            raise QueueFullError(
                f"{self.queued} requests wait already and no more may (queue="
                f"{self.limits.queue}); come again when some are done"
            )
        if job.scope not in self._had:
            # Whoever was away has no claim on the time since.
            self._had[job.scope] = min(self._had.values(), default=0.0)
        self._waiting.setdefault(job.scope, deque()).append(job)

    def finish(self, job: J) -> None:
        """Remove a finished job."""
        if job in self.running:
            self.running.remove(job)
        queue = self._waiting.get(job.scope)
        if queue is not None and job in queue:
            queue.remove(job)
        self._forget(job.scope)

    def account(self, jobs: Sequence[J], seconds: float, read: int | None = None) -> None:
        """Record the duration of a step, or of a piece."""
        if read is None:
            self.pace.stepped(seconds)
        else:
            self.pace.read(read, seconds)
        for job in jobs:
            if job.scope in self._had:
                self._had[job.scope] += seconds / len(jobs)

    def plan(self, now: float) -> StepPlan[J]:
        """Return the next plan, and move the jobs accordingly."""
        plan: StepPlan[J] = StepPlan(drop=self._over(now))
        for job in plan.drop:
            self.finish(job)
        for job in self._preempted(now):
            self.running.remove(job)
            job.computed, job.preemptions = 0, job.preemptions + 1
            self._waiting.setdefault(job.scope, deque()).appendleft(job)
            plan.preempt.append(job)
        if not plan.preempt:
            while (following := self._next(now)) is not None:
                self._waiting[following.scope].remove(following)
                self.running.append(following)
                plan.admit.append(following)
        plan.step = [job for job in self.running if job.steps]
        # Between scopes, as between those who wait: one long prompt is no reason for others to.
        reading = [job for job in self.running if not job.steps]
        plan.read = min(reading, key=lambda job: self._had[job.scope], default=None)
        return plan

    def piece(self, job: J) -> int:
        """Return the next piece of a job's prompt: to the grid, or to a stop."""
        return self.pace.piece(
            job.computed, job.known - job.computed, job.stops, alone=self._nobody_steps
        )

    def reading(self, first: J) -> tuple[list[J], int]:
        """Return who reads beside a job, itself included, and the most tokens of each.

        One whose prompt is read to its end takes others along whose prompts are, too: a forward
        over several short ones takes less time than one over each. Those so short that few-token
        kernels run over them are read alone, as they are where nobody else is; and all are where
        prompts are to be cut alike whatever the load.
        """
        piece = self.piece(first)
        batch = [first]
        ends = LEAST_TAIL < piece == first.known - first.computed
        if not ends or self.limits.itl_target_ms is None:
            return batch, piece
        room = self.pace.most(alone=self._nobody_steps) - piece
        others = [job for job in self.running if not job.steps and job is not first]
        for job in sorted(others, key=lambda job: self._had[job.scope]):
            rest = job.known - job.computed
            if LEAST_TAIL < rest <= room and self.piece(job) == rest:
                batch.append(job)
                room, piece = room - rest, max(piece, rest)
        return batch, piece

    # -- within ------------------------------------------------------------------------------------

    @property
    def _nobody_steps(self) -> bool:
        return not any(job.steps for job in self.running)

    @property
    def _free(self) -> int:
        return self.limits.rows - len(self.running)

    @property
    def reserved(self) -> int:
        """The estimated bytes of all rows."""
        return sum(self._bytes(job, job.known) for job in self.running)

    def _bytes(self, job: Job, tokens: int) -> int:
        """Return the bytes of a job's row when it has this many tokens."""
        taken = self.cost.of(tokens)
        if job.predicts:
            taken += self.cost.drafted * tokens
            if not job.steps:
                taken += self.cost.unread * job.known
        return taken

    def _over(self, now: float) -> list[J]:
        return [
            job
            for job in self.all()
            if job.cancelled or (job.deadline is not None and now >= job.deadline)
        ]

    def _next(self, now: float) -> J | None:
        """Return the job that gets a row next, or None.

        Who has no room is passed by others, so that much of the memory is not idle for one; but
        by so many only that it is its turn in the end.
        """
        if not self._free:
            return None
        large: list[J] = []
        for job in self._in_turn(now):
            if self._fits(job):
                for one in large:
                    one.passed += 1
                return job
            if job.passed >= PASSES:
                return None
            large.append(job)
        return None

    def _in_turn(self, now: float) -> Iterator[J]:
        """Yield waiting jobs in order of their turn."""
        # One by one: whether a job had better wait takes a look at all that run.
        queues = {
            scope: (job for job in tuple(queue) if not self._waits(job, now))
            for scope, queue in self._waiting.items()
        }
        ready = {scope: job for scope, jobs in queues.items() if (job := next(jobs, None))}
        scopes = list(ready)
        # Nobody takes the last row from under others who have none.
        if len(scopes) > 1 or any(job.scope not in ready for job in self.running):
            most = max(self.limits.rows - 1, 1)
            scopes = [scope for scope in scopes if self._rows_of(scope) < most] or scopes
        scopes.sort(key=lambda one: (self._had[one], self._rows_of(one), ready[one].arrival))
        for scope in scopes:
            yield ready[scope]
            yield from queues[scope]

    def _fits(self, job: J) -> bool:
        memory = self.limits.memory
        if memory is None or not self.running:
            return True
        ahead = self.limits.ahead
        wanted = (
            self._bytes(one, min(one.known + ahead, one.most)) for one in (*self.running, job)
        )
        return sum(wanted) <= memory

    def _rows_of(self, scope: str) -> int:
        return sum(job.scope == scope for job in self.running)

    def _preempted(self, now: float) -> list[J]:
        """Return a job to preempt, for memory or fairness."""
        memory = self.limits.memory
        if memory is not None and len(self.running) > 1 and self.reserved > memory:
            return [self._last(self.running)]
        if self._free:
            return []
        for scope, queue in self._waiting.items():
            if not queue or self._rows_of(scope):
                continue
            if now - queue[0].arrival < self.limits.patience:
                continue
            rich = [job for job in self.running if self._rows_of(job.scope) > 1]
            if rich:
                return [self._last(rich)]
        return []

    def last(self, jobs: Sequence[J]) -> J:
        """Return the job that gives way first: the lowest priority, the latest."""
        return self._last([job for job in self.running if job in jobs])

    @staticmethod
    def _last(jobs: Sequence[J]) -> J:
        """Return the job that is preempted first: the lowest priority, the latest."""
        worst, _ = min(
            enumerate(jobs),
            # One that has given it back three times keeps it, while there are others.
            key=lambda at: (at[1].priority, at[1].preemptions >= KEEPS_AFTER, -at[0]),
        )
        return jobs[worst]

    def _forget(self, scope: str) -> None:
        if not self._waiting.get(scope) and not self._rows_of(scope):
            self._waiting.pop(scope, None)
            self._had.pop(scope, None)
