"""A server under clients of all kinds for long: `python -m benchmarks.soak --minutes 30`."""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.servers import KINDS, Server
from benchmarks.serving_load import RESULTS, about, now
from quintet.errors import ServingError
from quintet.hub import demo_model
from quintet.measurement.serving.connection import Address
from quintet.measurement.serving.workload import Words

__all__ = ["Soak", "slope", "verdict"]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# The first part of a run, in which memory that is kept for good is taken, is not judged.
WARM = 0.3
SAMPLES_EVERY = 2.0
# Bytes in ten minutes.
MOST_GROWTH = 1 << 20
# A path, a body and its type that no server can answer, and must refuse.
GARBAGE: tuple[tuple[str, bytes | Any], ...] = (
    (CHAT, b"{"),
    (CHAT, b""),
    (CHAT, b"\xff\xfe{}"),
    (CHAT, b"[" * 20_000),
    (CHAT, {"messages": "hello"}),
    (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 10**9}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"no": 1}}),
    (CHAT, {"model": "nobody's", "messages": [{"role": "user", "content": "x"}]}),
    (TEXT, {"prompt": [-1, 2**70, 3.5]}),
    (TEXT, {"prompt": [[]], "max_tokens": 1}),
    (TEXT, {"prompt": "x", "max_tokens": -5}),
    (TEXT, {"prompt": "x", "stop": ["a" * 10_000]}),
    (TEXT, {"prompt": "x" * 2_000_000}),
    ("/v1/nothing", {"a": 1}),
    ("/tokenize", {"prompt": 7}),
)


@dataclass(slots=True)
class Soak:
    """Clients that ask whatever they like until it is over.

    Attributes:
        address: of the server.
        model: as it is called.
        until: when no request begins any more.
        drops: the share of requests whose client goes before the end.
        garbage: the share that no server can answer.
        statuses: what was answered, by the status; "cut off" and the like where nothing was.
        bad: statuses of garbage.
        unfinished: whole answers that were none.
    """

    address: Address
    model: str
    until: float
    drops: float = 0.3
    garbage: float = 0.05
    statuses: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    unfinished: list[str] = field(default_factory=list)

    async def client(self, number: int) -> None:
        """Ask one request behind the other."""
        dice = random.Random(number)
        while time.monotonic() < self.until:
            draw = dice.random()
            if draw < self.garbage:
                await self._misbehave(dice)
            else:
                await self._ask(dice, gone=draw < self.garbage + self.drops)

    async def _misbehave(self, dice: random.Random) -> None:
        path, body = dice.choice(GARBAGE)
        try:
            async with asyncio.timeout(120), self.address.ask(path, body) as reply:
                self.bad[str(reply.status)] += 1
                await reply.read()
        except (OSError, ServingError, TimeoutError) as error:
            self.bad[type(error).__name__] += 1

    async def _ask(self, dice: random.Random, *, gone: bool) -> None:
        path, body = self._body(dice)
        leaves_after = dice.choice((0, 0, 1, 2, 5, 10)) if gone else None
        # Before the head of an answer is there, some do not wait for it at all.
        waits = dice.choice((0.0, 0.01, 0.1, 1.0)) if gone else 120.0
        try:
            async with asyncio.timeout(waits), self.address.ask(path, body) as reply:
                self.statuses[str(reply.status)] += 1
                if reply.status != 200:
                    await reply.read()
                elif not body.get("stream"):
                    if leaves_after is None:
                        self._check(json.loads(await reply.read()))
                else:
                    await self._listen(reply, leaves_after)
        except TimeoutError:
            if not gone:
                self.unfinished.append("no answer in 120 s")
        except (OSError, ServingError, ValueError) as error:
            if not gone:
                self.unfinished.append(f"{type(error).__name__}: {error}"[:200])
        self.dropped += gone

    async def _listen(self, reply: Any, leaves_after: int | None) -> None:
        heard, last = 0, ""
        async for data in reply.events():
            if leaves_after is not None and heard >= leaves_after:
                return
            heard, last = heard + 1, data
        if leaves_after is None and last != "[DONE]":
            self.unfinished.append(f"a stream ended with {last[:80]!r}")

    def _check(self, answer: Any) -> None:
        if not all(choice["finish_reason"] for choice in answer["choices"]):
            self.unfinished.append("an answer without a finish_reason")

    def _body(self, dice: random.Random) -> tuple[str, dict[str, Any]]:
        text = Words().draw(dice.choice((3, 20, 60)), dice)
        common: dict[str, Any] = {
            "model": self.model,
            "max_tokens": dice.choice((1, 4, 16, 40)),
            "stream": dice.random() < 0.6,
            **dice.choice(
                (
                    {},
                    {"temperature": 0},
                    {"seed": dice.randrange(99), "top_p": 0.9},
                    {"n": 2, "temperature": 1},
                    {"ignore_eos": True},
                    {"stop": ["the", "\n\n"]},
                    {"frequency_penalty": 0.5, "logit_bias": {"5": -10}},
                )
            ),
        }
        if dice.random() < 0.3:
            common["logprobs"] = 2
        return TEXT, {**common, "prompt": text}


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Return how much the second of each pair grows while the first does by one."""
    if len(samples) < 2:
        return 0.0
    mean_x = sum(x for x, _ in samples) / len(samples)
    mean_y = sum(y for _, y in samples) / len(samples)
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


def verdict(result: dict[str, Any]) -> list[str]:
    """Return what is wrong with what a soak has come to."""
    wrong = []
    statuses = Counter(result["statuses"]) + Counter(result["garbage"])
    failures = {status: n for status, n in statuses.items() if status.startswith("5")}
    failures.pop("503", None)
    if failures:
        wrong.append(f"answered with {failures}")
    if result["garbage"].get("200"):
        wrong.append(f"{result['garbage']['200']} requests were answered that are none")
    if result["unfinished"]:
        wrong.append(f"{len(result['unfinished'])} answers without an end")
    growth = result["memory_bytes_in_10_minutes"]
    if growth > MOST_GROWTH:
        wrong.append(f"memory grows by {growth / 2**20:.2f} MiB in 10 minutes")
    for name in ("threads", "descriptors"):
        before, after = result[name]["idle_before"], result[name]["idle_after"]
        if after > before:
            wrong.append(f"{name}: {before} before, {after} behind")
    for model, load in result["load_after"]["models"].items():
        if load["running"] or load["waiting"]:
            wrong.append(f"{model} is not idle: {load}")
    for name, held in result["metrics_after"].items():
        if name.startswith("quintet_rows_bytes") and held:
            wrong.append(f"rows hold {held:.0f} bytes behind it")
    if result["exit_code"] != 0:
        wrong.append(f"the server ended with {result['exit_code']}")
    return wrong


async def _soak(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    address = Address.of(server.url)
    status, listed = await address.fetch("/v1/models")
    assert status == 200
    until = time.monotonic() + 60 * options.minutes
    soak = Soak(address, listed["data"][0]["id"], until)
    # What is made once is made before anything is counted.
    warming = Soak(address, soak.model, time.monotonic() + min(30.0, 6 * options.minutes))
    await asyncio.gather(*(warming.client(1000 + n) for n in range(4 * options.clients)))
    await _idle(server)
    before = {"threads": server.threads(), "descriptors": server.descriptors()}
    samples: list[tuple[float, int, int, int]] = []

    async def watch() -> None:
        while True:
            samples.append(
                (time.monotonic(), server.memory(), server.threads(), server.descriptors())
            )
            await asyncio.sleep(SAMPLES_EVERY)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(soak.client(n) for n in range(options.clients)))
    watching.cancel()
    await _idle(server)
    after = {"threads": server.threads(), "descriptors": server.descriptors()}
    judged = samples[int(WARM * len(samples)) :]
    return {
        "kind": "soak",
        "minutes": options.minutes,
        "clients": options.clients,
        "statuses": dict(soak.statuses),
        "garbage": dict(soak.bad),
        "dropped": soak.dropped,
        "unfinished": soak.unfinished[:20],
        "memory_bytes_in_10_minutes": 600 * slope([(at, memory) for at, memory, _, _ in judged]),
        "memory_most": max(memory for _, memory, _, _ in samples),
        "memory": [memory for _, memory, _, _ in samples[:: max(1, len(samples) // 60)]],
        "threads": {
            "idle_before": before["threads"],
            "idle_after": after["threads"],
            "most": max(threads for _, _, threads, _ in samples),
        },
        "descriptors": {
            "idle_before": before["descriptors"],
            "idle_after": after["descriptors"],
            "most": max(descriptors for _, _, _, descriptors in samples),
        },
        "load_after": server.get("/load")[1],
        "metrics_after": _kept(server),
    }


async def _idle(server: Server) -> None:
    """Wait until nothing is under way, and connections that are kept for a while are closed."""
    for _ in range(100):
        await asyncio.sleep(0.1)
        _, load = await asyncio.to_thread(server.get, "/load")
        if not any(one["running"] or one["waiting"] for one in load["models"].values()):
            break
    await asyncio.sleep(6.0)


def _kept(server: Server) -> dict[str, float]:
    """Return the numbers of /metrics that say what an idle server holds and has refused."""
    wanted = ("quintet_num_", "quintet_rows", "quintet_prefix_cache_bytes", "quintet_request")
    return {
        name: value
        for name, value in server.metrics().items()
        if name.startswith(wanted) and "_bucket" not in name
    }


def main() -> None:
    """Parse the options, soak, and end with 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description="Ask a server all kinds of things for long."
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="a checkpoint; the packaged one if left out")
    parser.add_argument("--out", type=Path, help="of the result (results/soak-DATE.json)")
    options = parser.parse_args()
    log = Path(tempfile.mkstemp(prefix="quintet-soak-", suffix=".log")[1])
    server = Server(
        KINDS[0],
        options.model or Path(demo_model()),
        rows=options.rows,
        context=256,
        threads=options.threads,
        log=log,
        # Small, so that what is read is also forgotten.
        options=("--kept", "4MiB"),
    )
    try:
        result = asyncio.run(_soak(server, options))
    finally:
        code = server.close(40.0)
    result["exit_code"] = code
    result["wrong"] = verdict(result)
    out = options.out or RESULTS / f"soak-{time.strftime('%Y-%m-%d')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "benchmarks.soak", *sys.argv[1:]]
    out.write_text(json.dumps({**result, **about(command), "time": now()}, indent=1) + "\n")
    for line in result["wrong"] or ["nothing is wrong"]:
        print(line)
    print(f"{out}; the server's log is {log}")
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
