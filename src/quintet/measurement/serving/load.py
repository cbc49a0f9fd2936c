"""Load patterns: closed-loop clients, or random arrivals."""

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from quintet.errors import InputError
from quintet.measurement.serving.asking import RequestRecord, Target
from quintet.measurement.serving.workload import Prompt, WorkloadShape

# Ports that a machine has.
MOST = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A load pattern.

    Attributes:
        conversations: how many at most.
        clients: how many conversations go on at once at most; None for any number.
        rate: how many begin a second, at random; None for the next when one is over.
        seconds: begin none after so long; None for no end.
        cut: hang up then, whatever is under way, so that it takes no longer.
        seed: of prompts, arrivals and of who goes.

    Raises:
        InputError: neither clients nor a rate, or a number that is none of either.
    """

    conversations: int
    clients: int | None = None
    rate: float | None = None
    seconds: float | None = None
    cut: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clients is None and self.rate is None:
            raise InputError("say how many clients there are, or at which rate requests arrive")
        if self.cut and self.seconds is None:
            raise InputError("cut needs seconds, after which to hang up")
        for name, value in (
            ("conversations", self.conversations),
            ("clients", self.clients),
            ("rate", self.rate),
            ("seconds", self.seconds),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name}={value} has to be above 0")
        if self.clients is not None and self.clients > MOST:
            raise InputError(
                f"clients={self.clients:,}: one machine has no more than {MOST:,} connections to "
                "another"
            )


@dataclass(slots=True)
class _Running:
    """The state of a run."""

    target: Target
    shape: WorkloadShape
    load: Load
    shared: Prompt
    requests: list[RequestRecord] = field(default_factory=list)

    async def converse(self, number: int, due: float | None) -> None:
        """Have one conversation."""
        # Of a conversation's own number: it is the same whoever else has one, and when.
        dice = random.Random(f"{self.load.seed} {number}")
        material, shape = self.target.material, self.shape
        parts = [self.shared, material.draw(shape.own, dice)]
        for turn in range(shape.turns):
            drop = dice.randrange(shape.out) if dice.random() < shape.drops else None
            one = RequestRecord(time.perf_counter() if due is None else due)
            self.requests.append(one)
            await self.target.listen(one, material.join(parts), shape.out, drop=drop)
            due = None
            if one.error is not None or one.dropped or turn + 1 == shape.turns:
                return
            answer = await self.target.continued(one)
            length = len(answer) if isinstance(answer, list) else one.completion
            parts += [answer, material.draw(max(1, shape.grows - length), dice)]


async def run(
    target: Target, shape: WorkloadShape, load: Load, *, warm: int = 1
) -> list[RequestRecord]:
    """Send a load's requests, and return the record of each.

    Args:
        target: who is asked.
        shape: what for.
        load: how much.
        warm: how many conversations go before, in turn, and do not count.
    """
    dice = random.Random(f"{load.seed} arrivals")
    shared = target.material.draw(shape.shared, dice) if shape.shared else target.material.join(())
    warming = _Running(target, shape, load, shared)
    for number in range(warm):
        await warming.converse(-1 - number, None)
    running = _Running(target, shape, load, shared)
    with suppress(TimeoutError):
        async with asyncio.timeout(load.seconds if load.cut else None):
            await (_open(running, dice) if load.rate is not None else _closed(running))
    return running.requests


def _begun(load: Load) -> Iterator[int]:
    """Yield the numbers of conversations while there is time for them."""
    began = time.perf_counter()
    for number in range(load.conversations):
        if load.seconds is not None and time.perf_counter() - began >= load.seconds:
            return
        yield number


async def _closed(running: _Running) -> None:
    numbers = _begun(running.load)

    async def client() -> None:
        for number in numbers:
            await running.converse(number, None)

    assert running.load.clients is not None
    async with asyncio.TaskGroup() as group:
        for _ in range(min(running.load.clients, running.load.conversations)):
            group.create_task(client())


async def _open(running: _Running, dice: random.Random) -> None:
    load = running.load
    assert load.rate is not None
    places = asyncio.Semaphore(load.clients or load.conversations)
    due = time.perf_counter()

    async def one(number: int, due: float) -> None:
        async with places:
            await running.converse(number, due)

    async with asyncio.TaskGroup() as group:
        for number in _begun(load):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(number, due))
            due += dice.expovariate(load.rate)
