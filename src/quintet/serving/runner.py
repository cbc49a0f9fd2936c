"""The thread that runs the model: messages in, plan, forwards, answers out."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from quintet.cache import RowContent
from quintet.errors import (
    DeadlineError,
    EngineStoppedError,
    InputError,
    QueueFullError,
)
from quintet.generation.engine import Engine as StepEngine
from quintet.ops.device_memory import empty_caches, is_shortage
from quintet.serving.answers import Answer
from quintet.serving.failures import no_memory, often, parted
from quintet.serving.figures import Figures, Snapshot
from quintet.serving.limits import Limits
from quintet.serving.pace import LEAST_TAIL
from quintet.serving.prefix import PrefixCache
from quintet.serving.request import Request, hand_over
from quintet.serving.reuse import PromptReuse
from quintet.serving.scheduler import RowCost, Scheduler, StepPlan

log = logging.getLogger("quintet.serving")

# So many forwards that fail, one after the other, are no request's fault.
FAILURES = 3
# A request that was in as many of them is given up.
PATIENCE = 2
# Seconds that engines who exchange tokens rest where none has any: longer each time, up to these.
SHORT_REST, REST = 0.001, 0.02


class Runner(PromptReuse):
    """Owns an engine; everything but messages runs in its thread.

    Args:
        engine: runs the model.
        limits: how much at once.
        clock: tells the time in seconds.
        cost: what rows hold.
    """

    def __init__(
        self, engine: StepEngine, limits: Limits, clock: Callable[[], float], cost: RowCost
    ) -> None:
        self.engine, self.limits, self._clock = engine, limits, clock
        self.figures = Figures()
        self.state = Snapshot(rows=limits.rows)
        self.stopped: Exception | None = None
        self.parted = False  # whether other processes that hold the model are gone
        # Held while a request is let in, so that none comes after the last messages were read.
        self._open = threading.Lock()
        self.scheduler: Scheduler[Request] = Scheduler(limits, cost, self._waits)
        self.prefix: PrefixCache[RowContent] = PrefixCache(
            limits.kept, divisible=not cost.row, tail=LEAST_TAIL
        )
        # Requests that came, of which the last state knows some.
        self._came = self._taken = self._known = 0
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._news: list[tuple[Request, Answer | Exception]] = []
        self._failures = 0
        # Seconds of the present turn that were steps, and when it began.
        self._stepping = 0.0
        self._turning: float | None = None
        # How long nobody is asked for steps of other engines; None if there are none.
        self._rest = 0.0 if engine.exchanges else None

    # -- messages, from any thread -----------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Submit a request.

        Raises:
            EngineStoppedError: nothing is generated any more.
        """
        with self._open:
            if self.stopped is not None:
                raise self.stopped
            self._came += 1
            self._inbox.put(lambda: self._take(request))

    @property
    def full(self) -> bool:
        """Whether rows and queue are full, counting requests that came during this step."""
        state = self.state
        present = state.running + state.waiting + self._came - self._known
        return present >= self.limits.rows + self.limits.queue

    @property
    def turning(self) -> float:
        """Seconds since the present turn began; 0 while idle."""
        began = self._turning
        return 0.0 if began is None else self._clock() - began

    def cancel(self, request: Request) -> None:
        """Cancel a request."""
        request.cancelled = True
        self._inbox.put(lambda: None)

    def forget(self, scope: str | None) -> None:
        """Clear the prefix cache, of one scope or all."""
        self._inbox.put(lambda: self.prefix.clear(scope))

    def turn_away(self, why: Exception) -> None:
        """Refuse the requests that never had a row."""
        self._inbox.put(lambda: self._turn_away(why))

    def stop(self, why: Exception) -> None:
        """Stop the thread, and fail all open requests."""
        self._inbox.put(lambda: self._stop(why))

    # -- the thread --------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until stopped."""
        try:
            while self.stopped is None:
                self.turn(wait=True)
        except BaseException as error:
            if isinstance(error, Exception) and self._part(error):
                return
            self._stop(EngineStoppedError(f"the engine's thread ended with {error!r}"))
            raise
        finally:
            # Nobody may wait for what will never come.
            self._read_messages(wait=False)
            self._publish()

    def turn(self, *, wait: bool = False) -> bool:
        """Read messages, carry out a plan and deliver; return whether there was work."""
        idle = not len(self.scheduler)
        if idle:
            self._free_lost_rows()
        self._read_messages(wait=wait and idle)
        began, self._stepping = self._clock(), 0.0
        self._turning = began
        plan: StepPlan[Request] = StepPlan()
        if self.stopped is None:
            plan = self.scheduler.plan(began)
            self._carry_out(plan)
            if plan.idle and self._rest is not None and self.stopped is None:
                self._attend()
        self._publish()
        self._turning = None
        self.figures.overhead_seconds += self._clock() - began - self._stepping
        return not plan.idle

    def _free_lost_rows(self) -> None:
        """Free rows without owners; there are none unless something here is wrong."""
        for text in self.engine.sequences:
            log.error("a row was held by no request, and is free again")
            self.figures.lost += 1
            self.engine.remove(text)

    def _read_messages(self, *, wait: bool) -> None:
        try:
            message = self._inbox.get(block=wait, timeout=self._rest)
            while True:
                message()
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _take(self, request: Request) -> None:
        self._taken += 1
        if self.stopped is not None:
            self._fail(request, self.stopped)
            return
        try:
            self.scheduler.submit(request)
        except QueueFullError as error:
            self._fail(request, error)

    def _turn_away(self, why: Exception) -> None:
        for request in self.scheduler.all():
            if request not in self.scheduler.running and request.cached is None:
                self._give_up(request, why)

    def _stop(self, why: Exception) -> None:
        with self._open:
            self.stopped = self.stopped or why
        for request in self.scheduler.all():
            self._give_up(request, why)

    def _carry_out(self, plan: StepPlan[Request]) -> None:
        for request in plan.drop:
            self._leave(request)
            if request.cancelled:
                self.figures.end("cancelled")
                self.figures.left[request.phase] += 1
            else:
                late = "the time of the request is over; give it a longer timeout"
                self._fail(request, DeadlineError(late))
        for request in plan.preempt:
            self._leave(request)
            self.figures.preempted += 1
        for request in plan.admit:
            try:
                self._enter(request)
            except Exception as error:
                if self._part(error):
                    return
                self._give_up(request, no_memory(error) if is_shortage(error) else error)
        running = self.scheduler.running
        steps = [request for request in plan.step if request in running]
        if steps:
            self._step(steps, None)
        if plan.read is not None and plan.read in running:
            self._step(*self.scheduler.reading(plan.read))

    def _enter(self, request: Request) -> None:
        text, figures = request.text, self.figures
        contents: list[RowContent] = []
        length = found = 0
        if text.watched is None:
            self._keep_shared(request)
            contents, length, found = self.prefix.match(request.scope, text.ids, request.apart)
        try:
            self.engine.add(text, *contents)
        except Exception as error:
            if not (isinstance(error, InputError) or is_shortage(error)):
                raise
            # What is kept is of a model that was changed since, or there is no room for a copy.
            self.prefix.clear()
            if text in self.engine.sequences:
                self.engine.remove(text)
            length = 0
            self.engine.add(text)
        request.follow()
        request.stops = self._stops(request, found)
        if length:
            figures.restored += 1
            self.figures.copied["hit"] += sum(one.nbytes for one in contents)
        if request.cached is None:
            request.cached = min(length, text.prompt_length)
            figures.cached += request.cached
            figures.queried += text.prompt_length
            request.began = self._clock()
            self.figures.queue_seconds.add(request.began - request.arrival)

    # -- giving rows back --------------------------------------------------------------------------

    def _leave(self, request: Request) -> None:
        """Free the row of a request, and store its content."""
        if request.text in self.engine.sequences:
            self._keep(request)
            self.engine.remove(request.text)

    def _step(self, requests: list[Request], piece: int | None) -> None:
        began, before = self._clock(), [request.text.computed for request in requests]
        try:
            new_tokens = self.engine.step([request.text for request in requests], piece)
        except Exception as error:
            self._stepping += self._clock() - began
            self._failed(requests, error)
            return
        now = self._clock()
        self._stepping += now - began
        self._failures = 0
        read = [request.text.computed - one for request, one in zip(requests, before, strict=True)]
        self.scheduler.account(requests, now - began, None if piece is None else sum(read))
        kind = "verify" if self.engine.drafted else "decode"
        if piece is not None:
            kind = "chunk"
            self.figures.read += sum(read)
        elif self.engine.drafted:
            self.figures.drafted += self.engine.drafted
            self.figures.accepted += sum(len(new) - 1 for new in new_tokens if new)
        self.figures.step(kind, now - began)
        self.figures.generated += sum(map(len, new_tokens))
        for request, new in zip(requests, new_tokens, strict=True):
            request.follow()
            if request.computed in request.stops:
                self._keep(request)
            if new:
                self._timed(request, now)
            self._queue_news(request)

    def _attend(self) -> None:
        """Take part in a step of other engines, and rest longer if there was none."""
        began = self._clock()
        try:
            if self.engine.attend():
                self._rest = 0.0
            else:
                self._rest = min(max(2 * (self._rest or 0.0), SHORT_REST), REST)
        except Exception as error:
            # Of a step of others, who are told by what came back.
            if is_shortage(error):
                self.prefix.clear()
                empty_caches()
            elif self._part(error):
                return
            log.error("what another process sent to experts of this one failed: %r", error)
        self._stepping += self._clock() - began

    def _timed(self, request: Request, now: float) -> None:
        """Record the time of new tokens."""
        if request.first is None:
            request.first = now
            self.figures.first_token_seconds.add(now - request.arrival)
            self.figures.prefill_seconds.add(now - request.began)
        else:
            self.figures.between_seconds.add(now - request.last)
        request.last = now

    def _queue_news(self, request: Request) -> None:
        """Queue the news of a request, and remove a finished one."""
        text = request.text
        try:
            news = request.news()
        except Exception as error:
            text.fail(error)
            news = error
        if news is not None:
            self._news.append((request, news))
        if not text.finished:
            return
        self._leave(request)
        self.scheduler.finish(request)
        if isinstance(news, Answer):
            self.figures.end(news.finish_reason or "stop")
            self.figures.prompt_tokens.add(text.prompt_length)
            self.figures.answer_tokens.add(len(text.new))
            if request.first is not None:
                self.figures.decode_seconds.add(request.last - request.first)
                self.figures.whole_seconds.add(request.last - request.arrival)
        elif news is not None:
            self.figures.end(news)

    def _failed(self, requests: Sequence[Request], error: Exception) -> None:
        """Handle a failed forward; no sequence has moved, so that it can be repeated."""
        if is_shortage(error):
            self._shed(requests, error)
            return
        if self._part(error):
            return
        lost = [request for request in requests if not self.engine.can_adapt(request.text)]
        for request in lost:
            name = request.text.adapter_name
            self._give_up(request, InputError(f"the adapter {name!r} is no longer there"))
        if lost:
            return
        self._failures += 1
        for request in requests:
            request.follow()
            request.failures += 1
            if request.failures >= PATIENCE:
                self._give_up(request, error)
        self._stop_if_often(error)

    def _shed(self, requests: Sequence[Request], error: Exception) -> None:
        """Drop one request after a forward ran out of memory."""
        self.prefix.clear()
        # What is left of one that gives way alone is no smaller the next time.
        self._failures += len(requests) == 1
        self._give_up(self.scheduler.last(requests), no_memory(error))
        empty_caches()
        self._stop_if_often(error)

    def _stop_if_often(self, error: Exception) -> None:
        if self._failures >= FAILURES:
            self._stop(often(FAILURES, error))

    def _part(self, error: Exception) -> bool:
        """Stop if an error means that other processes are gone; return whether it does."""
        why = parted(error)
        if why is not None:
            self.parted = True
            self._stop(why)
        return why is not None

    def _give_up(self, request: Request, error: Exception) -> None:
        if request.text in self.engine.sequences and not self.parted:
            self.engine.remove(request.text)
        self.scheduler.finish(request)
        self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        self.figures.end(error)
        self._news.append((request, error))

    def _publish(self) -> None:
        """Deliver news and publish the state."""
        scheduler = self.scheduler
        self.state = self.figures.snapshot(
            rows=self.limits.rows,
            running=len(scheduler.running),
            waiting=scheduler.queued,
            held=scheduler.reserved,
            kept=self.prefix.nbytes,
            evicted=self.prefix.evicted,
        )
        self._known = self._taken
        news, self._news = self._news, []
        hand_over(news)
