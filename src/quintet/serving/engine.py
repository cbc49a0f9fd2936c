"""A model that many ask at once: one thread generates, and answers go to whoever waits."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from quintet.errors import EngineStoppedError, InputError
from quintet.generation.engine import Engine as StepEngine
from quintet.generation.requests import Served
from quintet.serving.limits import Limits
from quintet.serving.request import Answer, LoopOutlet, Outlet, Request, Usage, hand_out
from quintet.serving.runner import Runner, State
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.stream import IncrementalDecoder

__all__ = ["Answer", "Engine", "Usage"]


class Engine:
    """Generates for any number of readers, in a thread of its own that alone runs the model.

    Each gets what `generate()` makes of the same prompt and options alone, whoever else is served.
    What was read of a prompt is kept for those that begin alike.

    Args:
        model: a model with a language-modelling head.
        tokenizer: reads prompts that are text, and writes answers; None for ids alone.
        limits: how much at once.
        nbits: 8, 6 or 4 bits a number of keys, values and latents; None to keep them as they are.
        clock: tells the time in seconds, for deadlines and turns.

    Raises:
        InputError: a limit is beyond the model's context.
    """

    def __init__(
        self,
        model: Served,
        tokenizer: PreTrainedTokenizer | None = None,
        limits: Limits | None = None,
        *,
        nbits: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or Limits(
            capacity=min(Limits().capacity, model.config.max_position_embeddings)
        )
        self.tokenizer = tokenizer
        self._clock = clock
        self._engine = StepEngine(model, self.limits.rows, self.limits.capacity, nbits=nbits)
        self._runner = Runner(self._engine, self.limits, clock)
        self._thread = threading.Thread(target=self._runner.run, name="quintet-engine", daemon=True)
        self._thread.start()

    # -- asking ------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: str | Sequence[int] | torch.Tensor,
        *,
        scope: str = "",
        priority: int = 0,
        timeout: float | None = None,
        stable: int = 0,
        **options: Any,
    ) -> AsyncIterator[Answer]:
        """Yield the answer to a prompt as it is made; to leave the loop is to cancel it.

        Args:
            prompt: text, which is read without special tokens being added to a rendered
                conversation, or ids.
            scope: whose request it is. Scopes take turns, and only within one is gone on from
                what was read before.
            priority: the higher are the last to give their row back.
            timeout: how many seconds the whole answer may take.
            stable: how many tokens of the prompt the next prompt will begin with, too: where a
                conversation goes on. Recurrent states are kept there.
            **options: as for `generate()` of one row; `generation_config` and others, too.

        Raises:
            InputError: no prompt, or an option that cannot be used.
            ContextLengthError: prompt and answer are longer than a row.
            QueueFullError: too many wait.
            DeadlineError: the time was over.
            EngineStoppedError: the engine was closed, or has failed.
        """
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[Answer | Exception] = asyncio.Queue()
        request = self._request(
            prompt, came.put_nowait, LoopOutlet(loop), scope, priority, timeout, stable, options
        )
        self._runner.submit(request)
        try:
            while True:
                one = await came.get()
                if isinstance(one, Exception):
                    raise one
                yield one
                if one.finish_reason is not None:
                    return
        finally:
            self._runner.cancel(request)

    def answer(
        self,
        prompt: str | Sequence[int] | torch.Tensor,
        *,
        scope: str = "",
        priority: int = 0,
        timeout: float | None = None,
        stable: int = 0,
        **options: Any,
    ) -> Iterator[Answer]:
        """Yield the answer to a prompt as it is made, to a thread that may wait.

        Arguments and errors are those of `generate`.
        """
        came: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()
        request = self._request(
            prompt, came.put, hand_out, scope, priority, timeout, stable, options
        )
        self._runner.submit(request)
        try:
            while True:
                one = came.get()
                if isinstance(one, Exception):
                    raise one
                yield one
                if one.finish_reason is not None:
                    return
        finally:
            self._runner.cancel(request)

    # -- what it is like ---------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """How much is under way, waits and is kept, as of the last step."""
        return self._runner.state

    @property
    def healthy(self) -> bool:
        """Whether it answers: it was not closed, and has not failed three times in a row."""
        return self._runner.stopped is None and self._thread.is_alive()

    def forget(self, scope: str | None = None) -> None:
        """Forget what was read, of one scope or of all."""
        self._runner.forget(scope)

    def close(self) -> None:
        """Stop; who still waits gets an `EngineStoppedError`."""
        self._runner.stop(EngineStoppedError("the engine was closed; make another one"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _request(
        self,
        prompt: str | Sequence[int] | torch.Tensor,
        reader: Callable[[Answer | Exception], None],
        outlet: Outlet,
        scope: str,
        priority: int,
        timeout: float | None,
        stable: int,
        options: dict[str, Any],
    ) -> Request:
        if timeout is not None and timeout <= 0:
            raise InputError(f"timeout={timeout} has to be a number of seconds above 0, or None")
        for name in ("streamer", "tokenizer"):
            if name in options:
                raise InputError(
                    f"{name} is the engine's own affair: it reads and writes with its tokenizer, "
                    "and what it makes comes from this iterator"
                )
        ids: Sequence[int] | torch.Tensor
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("the prompt is text and the engine has no tokenizer; give ids")
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = prompt
        text = self._engine.sequence(ids, tokenizer=self.tokenizer, **options)
        if not 0 <= stable < text.prompt_length:
            raise InputError(
                f"stable={stable} has to be less than the {text.prompt_length} tokens of the prompt"
            )
        self._engine.check_room(text)
        decoder = None
        if self.tokenizer is not None:
            decoder = IncrementalDecoder(self.tokenizer, skip_special_tokens=True)
        now = self._clock()
        return Request(
            text,
            reader,
            outlet,
            decoder,
            scope=scope,
            priority=priority,
            deadline=None if timeout is None else now + timeout,
            arrival=now,
            stable=stable,
        )
