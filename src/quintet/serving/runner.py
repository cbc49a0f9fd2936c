"""The thread that runs the model: messages in, a plan, forwards, answers out."""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quintet.cache import RowContent
from quintet.errors import DeadlineError, EngineStoppedError, QueueFullError
from quintet.generation.engine import Engine as StepEngine
from quintet.serving.answers import Answer
from quintet.serving.limits import Limits
from quintet.serving.prefix import PrefixCache
from quintet.serving.request import Outlet, Request
from quintet.serving.scheduler import Cost, Plan, Scheduler

__all__ = ["Runner", "State"]

# So many forwards that fail, one after the other, are no request's fault.
FAILURES = 3
# A request that was in as many of them is given up.
PATIENCE = 2


@dataclass(frozen=True, slots=True)
class State:
    """What a runner is at, as of its last step.

    Attributes:
        running: how many requests have a row.
        waiting: how many wait for one.
        kept: the bytes of what was read before.
        steps: how many forwards there were.
        generated: how many tokens were made.
        cached: how many tokens of prompts were not read, as they had been before.
        read: how many were.
        preempted: how often a row was given back.
    """

    running: int = 0
    waiting: int = 0
    kept: int = 0
    steps: int = 0
    generated: int = 0
    cached: int = 0
    read: int = 0
    preempted: int = 0


class Runner:
    """Owns an engine and what is kept beside it; everything but messages is its thread's.

    Args:
        engine: runs the model.
        limits: how much at once.
        clock: tells the time in seconds.
    """

    def __init__(self, engine: StepEngine, limits: Limits, clock: Callable[[], float]) -> None:
        self.engine, self.limits, self._clock = engine, limits, clock
        self.state = State()
        self.stopped: Exception | None = None
        # Held while a request is let in, so that none comes after the last messages were read.
        self._open = threading.Lock()
        per_token, per_row = engine.model.config.cache_numbers()
        width = engine.model.config.torch_dtype.itemsize if engine.model.config.torch_dtype else 4
        self.scheduler = Scheduler(limits, Cost(row=per_row * width, token=per_token * width))
        self.prefix: PrefixCache[RowContent] = PrefixCache(limits.kept, divisible=not per_row)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._news: list[tuple[Request, Answer | Exception]] = []
        self._failures = 0
        self._counts = dict.fromkeys(("steps", "generated", "cached", "read", "preempted"), 0)

    # -- messages, from any thread -----------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Let a request take part.

        Raises:
            EngineStoppedError: nothing is generated any more.
        """
        with self._open:
            if self.stopped is not None:
                raise self.stopped
            self._inbox.put(lambda: self._take(request))

    def cancel(self, request: Request) -> None:
        """Take note that nobody waits for a request, if anybody did."""
        request.cancelled = True
        self._inbox.put(lambda: None)

    def forget(self, scope: str | None) -> None:
        """Forget what was read, of one scope or of all."""
        self._inbox.put(lambda: self.prefix.clear(scope))

    def stop(self, why: Exception) -> None:
        """End the thread, and tell all that wait why."""
        self._inbox.put(lambda: self._stop(why))

    # -- the thread --------------------------------------------------------------------------------

    def run(self) -> None:
        """Go on until stopped."""
        try:
            while self.stopped is None:
                self.turn(wait=True)
        except BaseException as error:
            self._stop(EngineStoppedError(f"the engine's thread ended with {error!r}"))
            raise
        finally:
            # Nobody may wait for what will never come.
            self._read_messages(wait=False)
            self._publish()

    def turn(self, *, wait: bool = False) -> bool:
        """Read messages, do what is next and hand out what came of it; tell if there was any."""
        self._read_messages(wait=wait and not len(self.scheduler))
        if self.stopped is None:
            plan = self.scheduler.plan(self._clock())
            self._carry_out(plan)
        else:
            plan = Plan()
        self._publish()
        return not plan.idle

    def _read_messages(self, *, wait: bool) -> None:
        try:
            message = self._inbox.get(block=wait)
            while True:
                message()
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _take(self, request: Request) -> None:
        if self.stopped is not None:
            self._news.append((request, self.stopped))
            return
        try:
            self.scheduler.submit(request)
        except QueueFullError as error:
            self._news.append((request, error))

    def _stop(self, why: Exception) -> None:
        with self._open:
            self.stopped = self.stopped or why
        for request in self.scheduler.all():
            assert isinstance(request, Request)
            self._give_up(request, why)

    def _carry_out(self, plan: Plan) -> None:
        for job in plan.drop:
            assert isinstance(job, Request)
            self._leave(job)
            if not job.cancelled:
                self._news.append(
                    (
                        job,
                        DeadlineError("the time of the request is over; give it a longer timeout"),
                    )
                )
        for job in plan.preempt:
            assert isinstance(job, Request)
            self._leave(job)
            self._counts["preempted"] += 1
        for job in plan.admit:
            assert isinstance(job, Request)
            self._enter(job)
        steps = [job for job in plan.step if isinstance(job, Request)]
        if steps:
            self._step(steps, None)
        if isinstance(plan.read, Request) and plan.read in self.scheduler.running:
            self._step([plan.read], self.scheduler.piece(plan.read))

    def _enter(self, request: Request) -> None:
        text = request.text
        contents: list[RowContent] = []
        length = 0
        if text.watched is None:
            contents, length = self.prefix.match(self._shared_by(request), text.ids)
        self.engine.add(text, *contents)
        request.follow()
        if request.cached is None:
            request.cached = min(length, text.prompt_length)
            self._counts["cached"] += request.cached

    def _leave(self, request: Request) -> None:
        """Give the row of a request back, and keep what it holds."""
        if request.text in self.engine.sequences:
            self._keep(request)
            self.engine.remove(request.text)

    def _keep(self, request: Request) -> None:
        text = request.text
        if text.error is not None:
            return
        held = min(text.computed, len(text.ids) - (not text.only_reads))
        self.prefix.keep(
            self._shared_by(request),
            text.ids[:held],
            lambda start, stop: self.engine.extract(text, start, stop),
        )

    @staticmethod
    def _shared_by(request: Request) -> str:
        """Return who can go on from what a request reads: its scope, with the same adapter."""
        name = request.text.adapter_name
        return request.scope if name is None else f"{request.scope}\x00{name}"

    def _step(self, requests: list[Request], piece: int | None) -> None:
        began, before = self._clock(), [request.text.computed for request in requests]
        texts = [request.text for request in requests]
        self._counts["steps"] += 1
        try:
            made = self.engine.step(texts, piece)
        except Exception as error:
            self._failed(requests, error)
            return
        self._failures = 0
        self.scheduler.account(list(requests), self._clock() - began)
        self._counts["generated"] += sum(map(len, made))
        for request, computed in zip(requests, before, strict=True):
            request.follow()
            if piece is not None:
                self._counts["read"] += request.computed - computed
                if request.computed in request.stops:
                    self._keep(request)
            news = request.news()
            if news is not None:
                self._news.append((request, news))
            if request.text.finished:
                self._leave(request)
                self.scheduler.finish(request)

    def _failed(self, requests: Sequence[Request], error: Exception) -> None:
        """Take note that a forward failed: nobody has moved, so that it can be done again."""
        self._failures += 1
        for request in requests:
            request.failures += 1
            if request.failures >= PATIENCE:
                self._give_up(request, error)
        if self._failures >= FAILURES:
            self._stop(
                EngineStoppedError(
                    f"{FAILURES} forwards in a row failed, the last with {error!r}; look at its "
                    "cause, and make another engine"
                )
            )

    def _give_up(self, request: Request, error: Exception) -> None:
        if request.text in self.engine.sequences:
            self.engine.remove(request.text)
        self.scheduler.finish(request)
        self._news.append((request, error))

    def _publish(self) -> None:
        """Hand out what came of requests, at once where readers are in the same place."""
        self.state = State(
            running=len(self.scheduler.running),
            waiting=self.scheduler.queued,
            kept=self.prefix.nbytes,
            **self._counts,
        )
        news, self._news = self._news, []
        by_outlet: dict[Outlet, list[tuple[Request, Answer | Exception]]] = {}
        for request, one in news:
            by_outlet.setdefault(request.outlet, []).append((request, one))
        for outlet, its in by_outlet.items():
            outlet(its)
