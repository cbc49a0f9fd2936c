"""The serving engine: one thread generates, answers go to any number of readers."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch

from quintet.errors import DoesNotFitError, EngineStoppedError, InputError
from quintet.generation.engine import Engine as StepEngine
from quintet.generation.observing import Observed, Pooling
from quintet.generation.requests import Served
from quintet.generation.sequence import Sequence as Text
from quintet.generation.speculative.prediction import MTPModel
from quintet.serving.answers import Answer
from quintet.serving.figures import Snapshot
from quintet.serving.limits import Limits
from quintet.serving.memory import Room, room_of, with_drafts
from quintet.serving.options import RequestOptions, Speculation, check_speculation, drafting
from quintet.serving.request import LoopOutlet, Outlet, Request, hand_out, predicts
from quintet.serving.runner import Runner
from quintet.serving.transcript import Transcript
from quintet.tokenization import PreTrainedTokenizer


class Engine:
    """Serves concurrent requests in one thread that runs the model.

    Each gets what `generate()` makes of the same prompt and options alone, whoever else is served.
    What was read of a prompt is kept for those that begin alike.

    Args:
        model: a model with a language-modelling head.
        tokenizer: reads prompts that are text, and writes answers; None for ids alone.
        limits: how much at once.
        nbits: 8, 6 or 4 bits a number of keys, values and latents; None to keep them as they are.
        speculate: draft tokens for requests that do not say: by the model's prediction layers
            ("mtp"), from what is there of the text ("lookup"), or not ("off").
        clock: tells the time in seconds, for deadlines and turns.

    Raises:
        InputError: a limit is beyond the model's context, or there is no such way of drafting.
    """

    def __init__(
        self,
        model: Served,
        tokenizer: PreTrainedTokenizer | None = None,
        limits: Limits | None = None,
        *,
        nbits: int | None = None,
        speculate: Speculation = "off",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or Limits(
            capacity=min(Limits().capacity, model.config.max_position_embeddings)
        )
        self.tokenizer = tokenizer
        check_speculation(speculate)
        if speculate == "mtp" and not (isinstance(model, MTPModel) and model.prediction_depth()):
            raise InputError(
                f"speculate='mtp' needs layers of multi-token prediction, and this "
                f"{type(model).__name__} has none; take 'lookup', or 'off'"
            )
        self._speculate = speculate
        self._clock = clock
        self._engine = StepEngine(
            model, self.limits.rows, self.limits.capacity, nbits=nbits, paces_drafts=True
        )
        self._runner = Runner(
            self._engine,
            self.limits,
            clock,
            with_drafts(model, nbits, *self._engine.bytes_of_rows()),
        )
        self._thread = threading.Thread(target=self._runner.run, name="quintet-engine", daemon=True)
        self._thread.start()

    # -- asking ------------------------------------------------------------------------------------

    async def generate(
        self, prompt: str | Sequence[int] | torch.Tensor, **options: Any
    ) -> AsyncGenerator[Answer, None]:
        """Yield the answer to a prompt asynchronously; leaving the loop cancels it.

        With `max_new_tokens=0` the prompt is read, and one empty answer says what there is to know
        of it.

        Args:
            prompt: text, which is read without special tokens being added to a rendered
                conversation, or ids.
            **options: the fields of `RequestOptions`, and what `generate()` takes of one row:
                `generation_config`, `logits_processor`, `generator`, `adapter_name` and others.

        Raises:
            InputError: no prompt, or an option that cannot be used.
            ContextLengthError: prompt and answer are longer than a row.
            DoesNotFitError: the prompt takes more memory than rows may have.
            QueueFullError: too many wait.
            DeadlineError: the time was over.
            EngineStoppedError: the engine was closed, or has failed.
        """
        came: asyncio.Queue[Answer | Exception] = asyncio.Queue()
        outlet = LoopOutlet(asyncio.get_running_loop())
        with self._submitted(prompt, options, came.put_nowait, outlet):
            one = None
            while one is None or one.finish_reason is None:
                one = _answer(await came.get())
                yield one

    def answer(
        self, prompt: str | Sequence[int] | torch.Tensor, **options: Any
    ) -> Iterator[Answer]:
        """Yield the answer to a prompt synchronously.

        Arguments and errors are those of `generate`.
        """
        came: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()
        with self._submitted(prompt, options, came.put, hand_out):
            one = None
            while one is None or one.finish_reason is None:
                one = _answer(came.get())
                yield one

    async def embed(
        self,
        inputs: str | Sequence[int] | torch.Tensor,
        *,
        pooling: Pooling = "last",
        normalize: bool = False,
        scope: str = "",
        priority: int = 0,
        timeout: float | None = None,
        adapter_name: str | None = None,
    ) -> torch.Tensor:
        """Return the embedding (C,) of a text, in float32; cancelling the wait stops it.

        It is made of what the last layer makes of the text, behind the last norm, and is read in
        pieces between the steps of others.

        Args:
            inputs: text or ids.
            pooling: "last" for the state of the last token, "mean" for the mean of all.
            normalize: give the vector the length 1.
            scope: as for `generate`, like all that follows.
            priority: who is the last to give its row back.
            timeout: how many seconds it may take.
            adapter_name: the adapter that it is made with.

        Raises:
            InputError: no text, or an option that cannot be used.
            ContextLengthError: the text is longer than a row.
            DoesNotFitError: it takes more memory than rows may have.
            QueueFullError: too many wait.
            DeadlineError: the time was over.
            EngineStoppedError: the engine was closed, or has failed.
        """
        came: asyncio.Queue[Answer | Exception] = asyncio.Queue()
        outlet = LoopOutlet(asyncio.get_running_loop())
        options = {
            "scope": scope,
            "priority": priority,
            "timeout": timeout,
            "adapter_name": adapter_name,
            "max_new_tokens": 0,
        }
        observed = Observed(pooling=pooling)
        with self._submitted(inputs, options, came.put_nowait, outlet, observed):
            _answer(await came.get())
        return observed.vector(normalize=normalize)

    # -- what it is like ---------------------------------------------------------------------------

    @property
    def model(self) -> Served:
        """The served model; only the engine's thread may run it."""
        return self._engine.model

    @property
    def room(self) -> Room:
        """The memory of model and rows."""
        cost = self._runner.scheduler.cost
        return room_of(self.model, self.limits, cost.drafting if self._speculate == "mtp" else cost)

    @property
    def state(self) -> Snapshot:
        """The running, waiting and cached work as of the last step."""
        return self._runner.state

    @property
    def full(self) -> bool:
        """Whether another request would be refused, as of the last step."""
        return self._runner.full

    @property
    def healthy(self) -> bool:
        """Whether the engine is open and has not failed for good."""
        return self._runner.stopped is None and self._thread.is_alive()

    @property
    def turning(self) -> float:
        """Seconds since the present turn began; 0 while idle."""
        return self._runner.turning

    @property
    def stopped(self) -> Exception | None:
        """The reason why the engine stopped, or None."""
        return self._runner.stopped

    def forget(self, scope: str | None = None) -> None:
        """Clear the prefix cache, of one scope or all."""
        self._runner.forget(scope)

    def turn_away(self) -> None:
        """Refuse waiting requests; running ones may finish.

        Those that come later are taken as ever: whoever will close it takes none any more.
        """
        self._runner.turn_away(
            EngineStoppedError("the engine will be closed before it is your turn; ask another one")
        )

    def close(self) -> None:
        """Stop the engine; open requests get an `EngineStoppedError`.

        Where engines of several processes exchange tokens, it waits until all are closed. Left by
        an error, or after one that it did not recover from, it ends all of them.

        Raises:
            RankFailedError: meanwhile, another process failed.
        """
        self._close(None)

    def _close(self, why: BaseException | None) -> None:
        closed = EngineStoppedError("the engine was closed; make another one")
        self._runner.stop(closed)
        if threading.current_thread() is not self._thread:
            self._thread.join()
            stopped = self._runner.stopped
            if not self._runner.parted:
                self._engine.close(why if stopped is closed else stopped)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(error if isinstance(error, Exception) else None)

    @contextmanager
    def _submitted(
        self,
        prompt: str | Sequence[int] | torch.Tensor,
        options: dict[str, Any],
        reader: Callable[[Answer | Exception], None],
        outlet: Outlet,
        observed: Observed | None = None,
    ) -> Iterator[None]:
        """Submit a request for the duration of the context."""
        request = self._request(prompt, options, reader, outlet, observed)
        self._runner.submit(request)
        try:
            yield
        finally:
            self._runner.cancel(request)

    def _request(
        self,
        prompt: str | Sequence[int] | torch.Tensor,
        options: dict[str, Any],
        reader: Callable[[Answer | Exception], None],
        outlet: Outlet,
        observed: Observed | None,
    ) -> Request:
        own, others = RequestOptions.split(options)
        ids: Sequence[int] | torch.Tensor
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("the prompt is text and the engine has no tokenizer; give ids")
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = prompt
        only_reads = others.get("max_new_tokens") == 0
        if only_reads:
            others["max_new_tokens"] = 1
        else:
            others |= drafting(own.speculate, others, self._speculate)
        text = self._engine.sequence(ids, tokenizer=self.tokenizer, **others)
        text.only_reads = only_reads
        if observed is None and (own.logprobs is not None or own.prompt_logprobs is not None):
            observed = Observed(logprobs=own.logprobs, prompt_logprobs=own.prompt_logprobs)
        text.observed = observed
        transcript = Transcript(
            self.tokenizer,
            own.stop,
            keep_special=own.keep_special,
            least=others.get("min_new_tokens") or 0,
        )
        text.listener = transcript.take
        self._engine.check_room(text)
        self._check_memory(text)
        now = self._clock()
        return Request(
            text,
            reader,
            outlet,
            transcript,
            scope=own.scope,
            salt=own.salt,
            priority=own.priority,
            deadline=None if own.timeout is None else now + own.timeout,
            arrival=now,
            stable=own.stops(text.prompt_length),
        )

    def _check_memory(self, text: Text) -> None:
        """Check that a request fits the memory when it runs alone.

        Raises:
            DoesNotFitError: it cannot.
        """
        memory, cost, prompt = self.limits.memory, self._runner.scheduler.cost, text.prompt_length
        if predicts(text):
            cost = cost.drafting
        needed = prompt + min(text.max_new_tokens, self.limits.ahead)
        if memory is not None and cost.of(needed) > memory:
            fits = max(memory - cost.row, 0) // cost.token if cost.token else 0
            raise DoesNotFitError(
                f"a prompt of {prompt} tokens and room for {needed - prompt} of its answer take "
                f"{cost.of(needed):,} bytes, and rows have memory={memory:,}, which is enough for "
                f"{fits:,} tokens; shorten it, or give the engine more memory"
            )


def _answer(one: Answer | Exception) -> Answer:
    """Return an answer, or raise an exception that came instead."""
    if isinstance(one, Exception):
        raise one
    return one
