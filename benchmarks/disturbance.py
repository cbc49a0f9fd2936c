"""What one client does to the others: `python -m benchmarks.disturbance`."""

import argparse
import asyncio
import json
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.servers import KINDS, Server
from benchmarks.serving_load import RESULTS, about, now
from quintet.errors import ServingError
from quintet.hub import demo_model
from quintet.measurement.serving.connection import Address

__all__ = ["NUISANCES"]

PATH = "/v1/completions"
# How many times slower the slowest gaps of the others may be.
MOST = 2.0
Nuisance = Callable[[Address, str], Awaitable[None]]


def body(model: str, tokens: int, **more: Any) -> dict[str, Any]:
    """Return a body that asks for exactly so many tokens as a stream."""
    return {
        "model": model,
        "prompt": "The quick brown fox",
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        **more,
    }


async def _sent(address: Address, content: dict[str, Any], seconds: float) -> None:
    """Ask, and hang up after so many seconds."""
    with suppress(TimeoutError, OSError, ServingError):
        async with asyncio.timeout(seconds), address.ask(PATH, content) as reply:
            await reply.read()


async def abandoned(address: Address, model: str) -> None:
    """Ask for much, and leave."""
    await _sent(address, body(model, 200), 0.3)


async def stopped(address: Address, model: str) -> None:
    """Ask for very much, and read none of it."""
    content = json.dumps(body(model, 200, n=2, logprobs=20, temperature=1)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((address.host, address.port))
        sock.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await asyncio.sleep(3)


async def long_prompt(address: Address, model: str) -> None:
    """Send a prompt of a hundred thousand tokens."""
    await _sent(address, body(model, 4, prompt="7 " * 100_000), 5)


async def bomb(address: Address, model: str) -> None:
    """Send an expression that takes for ever to compile."""
    await _sent(address, body(model, 4, regex="((a{1,1000}){1,1000}b){1,1000}"), 5)


async def nested(address: Address, model: str) -> None:
    """Send a schema that is deep and wide."""
    schema: dict[str, Any] = {"type": "string"}
    for depth in range(20):
        schema = {"type": "object", "properties": {f"p{depth}{n}": schema for n in range(2)}}
        if len(json.dumps(schema)) > 50_000:
            break
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    await _sent(address, body(model, 20, response_format=form), 5)


NUISANCES: dict[str, Nuisance] = {
    "abandoned request": abandoned,
    "stopped reader": stopped,
    "100k prompt": long_prompt,
    "expression": bomb,
    "schema": nested,
}


async def _gaps(address: Address, model: str, seconds: float, clients: int) -> list[float]:
    """Return the seconds between tokens of some clients that ask all the time."""
    until = time.monotonic() + seconds
    gaps: list[float] = []

    async def client() -> None:
        while time.monotonic() < until:
            async with address.ask(PATH, body(model, 100)) as reply:
                came = [time.perf_counter() async for data in reply.events() if data != "[DONE]"]
            gaps.extend(after - before for before, after in pairwise(came))

    await asyncio.gather(*(client() for _ in range(clients)))
    return gaps


async def _measured(server: Server, options: argparse.Namespace) -> list[dict[str, Any]]:
    address = Address.of(server.url)
    _, listed = await address.fetch("/v1/models")
    model = listed["data"][0]["id"]
    await _gaps(address, model, 2, options.clients)
    rows = []
    for name, nuisance in NUISANCES.items():
        alone: list[float] = []
        beside: list[float] = []

        async def go_on(nuisance: Nuisance = nuisance) -> None:
            while True:
                await nuisance(address, model)

        for _ in range(options.rounds):
            alone += await _gaps(address, model, options.seconds, options.clients)
            task = asyncio.create_task(go_on())
            beside += await _gaps(address, model, options.seconds, options.clients)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.5)
        calm, busy = (np.percentile(one, (50, 99)).tolist() for one in (alone, beside))
        rows.append(
            {"nuisance": name, "alone": calm, "beside": busy, "p99_ratio": busy[1] / calm[1]}
        )
        print(
            f"{name:20} p50 {1e3 * calm[0]:7.1f} -> {1e3 * busy[0]:7.1f} ms, "
            f"p99 {1e3 * calm[1]:7.1f} -> {1e3 * busy[1]:7.1f} ms, x {busy[1] / calm[1]:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Parse the options, measure, and end with 1 where others wait too long."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.disturbance", description="Measure what nuisances cost others."
    )
    parser.add_argument("--seconds", type=float, default=5, help="of each half of a round (5)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=2, help="that ask as one should (2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="a checkpoint; the packaged one if left out")
    parser.add_argument("--out", type=Path, help="of the result (results/disturbance-DATE.json)")
    options = parser.parse_args()
    log = Path(tempfile.mkstemp(prefix="quintet-disturbance-", suffix=".log")[1])
    with Server(
        KINDS[0],
        options.model or Path(demo_model()),
        rows=8,
        context=512,
        threads=options.threads,
        log=log,
    ) as server:
        rows = asyncio.run(_measured(server, options))
    out = options.out or RESULTS / f"disturbance-{time.strftime('%Y-%m-%d')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "benchmarks.disturbance", *sys.argv[1:]]
    result = {"kind": "disturbance", "rows": rows, **about(command), "time": now()}
    out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(row["p99_ratio"] > MOST for row in rows))


if __name__ == "__main__":
    main()
