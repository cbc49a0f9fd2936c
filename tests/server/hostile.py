"""A server whose steps take as long as is said, and clients that do what they should not."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from quintet.measurement.serving.connection import Address, Reply
from quintet.server.registry import Loaded, Offer
from quintet.serving import Engine, Limits
from quintet.serving.figures import Snapshot
from served import Running, serving
from server.talking import CONTEXT, chat_model
from waiting import PATIENCE

__all__ = ["BROKEN", "Slow", "completion", "first_event", "slow"]

# An id of the model that no token has, whose embedding is made of no numbers.
BROKEN = -1


@dataclass
class Slow:
    """A server whose steps take at least `seconds`, and its only engine.

    Attributes:
        halts_at: before the first step where this is so, the engine halts until told to go on.
        halted: whether it does.
        goes_on: whether it was told.
    """

    server: Running
    engine: Engine
    broken: int
    seconds: float = 0.0
    halts_at: Callable[[Snapshot], bool] = lambda _: False
    halted: threading.Event = field(default_factory=threading.Event)
    goes_on: threading.Event = field(default_factory=threading.Event)

    @asynccontextmanager
    async def asked(self, body: dict[str, Any], key: str | None = None) -> AsyncIterator[Reply]:
        """Ask for a completion; to leave is to hang up."""
        async with Address.of(self.server.url, key).ask("/v1/completions", body) as reply:
            yield reply

    async def whole(self, body: dict[str, Any], key: str | None = None) -> tuple[int, Any]:
        """Ask for a completion that is no stream, and wait for it."""
        return await Address.of(self.server.url, key).fetch("/v1/completions", body)

    async def so(self, what: Callable[[], object]) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(PATIENCE):
            while not what():
                await asyncio.sleep(0.001)

    async def until(self, *, running: int | None = None, waiting: int | None = None) -> None:
        """Wait until so many are under way and so many wait."""

        def there() -> bool:
            state = self.engine.state
            return running in (None, state.running) and waiting in (None, state.waiting)

        await self.so(there)

    async def idle(self) -> None:
        """Wait until nothing is under way, nothing waits and no row is held."""

        def nothing() -> bool:
            state = self.engine.state
            return not (state.running or state.waiting or state.held)

        await self.so(nothing)

    def halt(self, when: Callable[[Snapshot], bool]) -> None:
        """Let the engine halt before the first step that begins when something is so."""
        self.halted.clear()
        self.goes_on.clear()
        self.halts_at = when

    def go_on(self) -> None:
        """Let it go on."""
        self.halts_at = lambda _: False
        self.goes_on.set()

    def stand(self) -> None:
        """Halt, where that is so: in the engine's thread."""
        if self.halts_at(self.engine.state):
            self.halted.set()
            assert self.goes_on.wait(PATIENCE)


def completion(tokens: int = 8, **changes: Any) -> dict[str, Any]:
    """Return a body that asks for exactly so many tokens, greedily."""
    return {
        "model": "tiny",
        "prompt": [40, 41, 42, 43],
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        **changes,
    }


async def first_event(reply: Reply) -> dict[str, Any]:
    """Return the first event of a stream."""
    async for data in reply.events():
        found: dict[str, Any] = json.loads(data)
        return found
    raise AssertionError("the stream has no event")


@contextmanager
def slow(
    seconds: float = 0.0, limits: dict[str, int] | None = None, **settings: Any
) -> Iterator[Slow]:
    model, tokenizer = chat_model()
    broken = model.config.vocab_size + BROKEN
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = torch.nan
    counts = {"rows": 4, "capacity": CONTEXT, "piece": 64, **(limits or {})}
    engine = Engine(model, tokenizer, Limits(**counts))
    one = Loaded(engine, tokenizer, CONTEXT, "fp_test")
    step = engine._engine.step
    with serving(Offer("tiny", lambda: one, loaded=one), **settings) as running:
        it = Slow(running, engine, broken, seconds)

        def stepping(*arguments: Any) -> Any:
            it.stand()
            time.sleep(it.seconds)
            return step(*arguments)

        engine._engine.step = stepping  # type: ignore[method-assign]
        yield it
