"""What a server was to reach: `python -m benchmarks.serving_targets [--only REGEX]`.

Each function measures one thing on a real process, most beside what the library does of the same
without a server, in turns: T2 one client, T4 the first token, T5 gaps beside a long prompt, T6 what
is read of a conversation, T7 many short prompts, T9 a crowd, T11 drafts looked up, T12 start and
rest.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.servers import Server, processor_seconds
from benchmarks.serving_findings import (
    DEMO,
    Bench,
    Finding,
    answered,
    generated,
    ids_of,
    model_of,
    table,
    target_of,
)
from benchmarks.serving_load import RESULTS, about, now
from benchmarks.speculation import prompts as held_out
from quintet import AutoTokenizer
from quintet.measurement.machine import Machine, MachineLoad
from quintet.measurement.serving.asking import RequestRecord, Target
from quintet.measurement.serving.connection import Address
from quintet.measurement.serving.load import Load as Clients
from quintet.measurement.serving.load import run
from quintet.measurement.serving.workload import SHAPES, WORDS, Words, WorkloadShape

DENSE = "qwen2-0.5b"
# Whose conversations are followed, and in how many bits their caches are.
KEPT = (
    (DENSE, None),
    (DENSE, "int8"),
    ("zamba2-1.2b", None),
    ("zamba2-1.2b", "int8"),
    ("deepseek-v2-lite-6l", None),
    ("qwen1.5-moe-a2.7b-6l", None),
    (DEMO, None),
)
# Seconds for which an idle server is watched.
REST = 10.0
# The packaged model's context is 1,024 tokens.
SHORT = WorkloadShape(shared=0, own=300, out=24, turns=6, grows=120)


def one_client(bench: Bench) -> Iterator[Finding]:
    """T2: what one client gets, as a part of what `generate()` makes."""
    for name, prompt, out, least in ((DENSE, 512, 64, 0.97), (DEMO, 64, 256, 0.70)):
        model = model_of(bench.path(name))
        with bench.server(name) as server:
            target = target_of(server)
            pairs = []
            for turn in range(-1, 2 * bench.rounds):
                ids = ids_of(model, prompt, turn)
                alone = generated(model, ids, out)
                served = answered(target, ids, out)
                if turn >= 0:
                    pairs.append((alone, served.ended - served.due))
        share = statistics.median(alone / served for alone, served in pairs)
        what = f"one client beside generate(), {name}, {prompt} + {out} tokens"
        yield Finding("T2", what, least, share, least=True, more={"seconds": pairs})


def first_token(bench: Bench) -> Iterator[Finding]:
    """T4: how long a prompt of 512 tokens takes to its first token."""
    model = model_of(bench.path(DENSE))
    with bench.server(DENSE) as server:
        target = target_of(server)
        pairs, cached = [], []
        shared = ids_of(model, 448, 7)
        for turn in range(-1, 8 * bench.rounds):
            ids = ids_of(model, 512, 100 + turn)
            alone = generated(model, ids, 1)
            served = answered(target, ids, 1)
            again = answered(target, torch.cat([shared, ids[:, :64]], dim=1), 1)
            if turn >= 0:
                pairs.append((alone, served.came[0] - served.due))
                cached.append(again.came[0] - again.due)
                assert again.cached == 448, again.cached
    prefills, firsts = (list(one) for one in zip(*pairs, strict=True))
    prefill = statistics.median(prefills)
    more = {"prefill": prefills, "first_token": firsts}
    for part, most in ((50, 1.05), (95, 1.2)):
        share = float(np.percentile(firsts, part)) / prefill
        what = f"the first token behind 512, {part}th percentile, of the prefill ({prefill:.2f} s)"
        yield Finding("T4", what, most, share, more=more)
    what = "the first token behind 512 of which 448 were read before"
    yield Finding("T4", what, 0.25, statistics.median(cached), unit=" s", more={"each": cached})


def long_prompt(bench: Bench) -> Iterator[Finding]:
    """T5: gaps between tokens while a prompt of 4,096 comes, with one client and with four."""
    model = model_of(bench.path(DENSE))
    with bench.server(DENSE, context=4352) as server:
        target = target_of(server)

        async def beside(clients: int, seed: int) -> tuple[list[float], list[float]]:
            own = [RequestRecord(time.perf_counter()) for _ in range(clients)]
            asks = [
                asyncio.create_task(
                    target.listen(one, ids_of(model, 64, seed + n)[0].tolist(), 256)
                )
                for n, one in enumerate(own)
            ]
            while any(len(one.came) < 16 for one in own):
                await asyncio.sleep(0.05)
            began = time.perf_counter()
            read = await target.ask(ids_of(model, 4096, seed)[0].tolist(), 1)
            assert read.error is None, read.error
            for task in asks:
                task.cancel()
            await asyncio.gather(*asks, return_exceptions=True)
            calm: list[float] = []
            busy: list[float] = []
            for one in own:
                for before, after in pairwise(one.came):
                    (busy if before >= began else calm).append(after - before)
            return calm, [gap for gap in busy if gap]

        asyncio.run(beside(1, 900))
        for clients in (1, 4):
            calm: list[float] = []
            busy: list[float] = []
            for turn in range(max(1, bench.rounds // 2)):
                found = asyncio.run(beside(clients, 1000 * clients + 10 * turn))
                calm += found[0]
                busy += found[1]
            p50, p99 = np.percentile(busy, (50, 99))
            more = {"step": statistics.median(calm), "p50": p50, "gaps": busy}
            what = (
                f"gap p99 while 4,096 tokens come, {clients} clients (a step is and a chunk 200 ms)"
            )
            yield Finding("T5", what, 220, 1e3 * p99, unit=" ms", more=more)


def conversation(bench: Bench) -> Iterator[Finding]:
    """T6: tokens that are read in a conversation of six turns, as a part of those that are new."""
    for name, bits in KEPT:
        if not re.search(bench.models, f"{name} {bits or ''}"):
            continue
        shape = SHORT if name == DEMO else SHAPES["agent"]
        options = () if bits is None else ("--cache-dtype", bits)
        with bench.server(name, *options, rows=2, context=5120) as server:
            share, more = asyncio.run(_talk(server, bench.path(name), shape))
        what = f"read of what is new in six turns, {name}{f', cache in {bits}' if bits else ''}"
        yield Finding("T6", what, 1.15, share, more=more)


async def _talk(server: Server, path: Path, shape: WorkloadShape) -> tuple[float, dict[str, Any]]:
    """Return what is read of each new token, and the turns."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    dice, words = random.Random(0), Words()
    # What is written are words that are read again as the tokens they were written in.
    single = [one for word in WORDS if len(one := tokenizer.encode(f" {word}")) == 1]
    address = Address.of(server.url)
    _, listed = await address.fetch("/v1/models")
    body = {
        "model": listed["data"][0]["id"],
        "temperature": 0,
        "max_tokens": shape.out,
        "ignore_eos": True,
        "logit_bias": {str(one[0]): 100 for one in single},
    }
    messages: list[dict[str, Any]] = []
    turns, known, size = [], 0, shape.own
    before = _computed(server)
    for _ in range(shape.turns):
        messages.append({"role": "user", "content": words.draw(size, dice)})
        status, answer = await address.fetch("/v1/chat/completions", {**body, "messages": messages})
        assert status == 200, answer
        usage = answer["usage"]
        turns.append((usage["prompt_tokens"], usage["prompt_tokens"] - known))
        known = usage["prompt_tokens"] + usage["completion_tokens"]
        messages.append(
            {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
        )
        size = shape.grows - shape.out
    read = _computed(server) - before
    return read / sum(new for _, new in turns), {"turns": turns, "read": read}


def _computed(server: Server) -> float:
    metrics = server.metrics()
    return sum(v for name, v in metrics.items() if name.startswith("quintet_computed_tokens_total"))


def short_prompts(bench: Bench) -> Iterator[Finding]:
    """T7: prompts of 128 tokens and one of an answer, beside `generate()` of eight at once."""
    model, shape, count = model_of(bench.path(DENSE)), SHAPES["eval"], 64
    with bench.server(DENSE, context=512) as server:
        target = target_of(server)
        pairs = []
        for turn in range(-1, bench.rounds):
            batches = [ids_of(model, shape.own, 100 * turn + n, rows=8) for n in range(count // 8)]
            alone = sum(generated(model, batch, shape.out) for batch in batches)
            load = Clients(conversations=count, clients=16, seed=turn + 1)
            began = time.perf_counter()
            asked = asyncio.run(run(target, shape, load, warm=0))
            assert all(one.error is None for one in asked)
            if turn >= 0:
                pairs.append((alone, time.perf_counter() - began))
    share = statistics.median(alone / served for alone, served in pairs)
    what = "many prompts of 128 tokens beside generate() of eight at once"
    yield Finding("T7", what, 0.9, share, least=True, more={"seconds": pairs, "prompts": count})


def crowd(bench: Bench) -> Iterator[Finding]:
    """T9: 64 clients at once, and how soon is refused who comes when there is no room."""
    shape = WorkloadShape(shared=64, own=64, out=16)
    with bench.server(DENSE, context=512) as server:
        target = target_of(server)
        load = Clients(conversations=128, clients=64)
        asked = asyncio.run(run(target, shape, load))
    failed = [one.error for one in asked if one.error is not None]
    times = [one.ended - one.due for one in asked]
    yield Finding("T9", "of 64 clients, requests without an end", 0, len(failed))
    share = max(times) / statistics.median(times)
    yield Finding("T9", "of 64 clients, the slowest of the median", 3, share, more={"each": times})
    with bench.server(DENSE, "--queue", "0", rows=1) as server:
        refused = asyncio.run(_refused(target_of(server), 100 * bench.rounds))
    p50, p99 = (1e3 * x for x in np.percentile(refused, (50, 99)))
    what = "a refusal while a forward runs, p99"
    yield Finding("T9", what, 5, p99, unit=" ms", more={"p50": p50, "each": refused})


async def _refused(target: Target, count: int) -> list[float]:
    """Return how long refusals take while a prompt is read, or an answer written."""
    prompt = random.Random(0).choices(range(300, 2000), k=3000)

    async def keep_it_busy() -> None:
        while True:
            record = await target.ask(prompt, 1000)
            # A refusal is for one of those below that has just been let in.
            assert record.error is None or record.status == 503, record.error

    under_way = asyncio.create_task(keep_it_busy())
    await asyncio.sleep(0.5)
    found: list[float] = []
    while len(found) < count and not under_way.done():
        began = time.perf_counter()
        async with target.address.ask("/v1/completions", target.body([300, 301], 1)) as reply:
            await reply.read()
        # One that comes between two of the others is answered.
        if reply.status == 503:
            found.append(time.perf_counter() - began)
        await asyncio.sleep(0.05)
    under_way.cancel()
    await asyncio.gather(under_way, return_exceptions=True)
    assert len(found) == count, "whoever was to keep the server busy did not"
    return found


def looked_up(bench: Bench) -> Iterator[Finding]:
    """T11: answers with drafts that are looked up, as often as without."""
    tokenizer = AutoTokenizer.from_pretrained(bench.path(DEMO))
    texts = held_out(tokenizer, 4 * bench.rounds, 256)
    # A text, and its beginning once more: what follows stands above.
    quoted = [torch.cat([ids, ids[:, :64]], dim=1) for ids in texts]
    other = [ids_of(None, 64, n) for n in range(2 * bench.rounds)]
    drawn = {"temperature": 1.0, "seed": 1}
    cases: tuple[tuple[str, str, list[torch.Tensor], int, dict[str, Any], float], ...] = (
        ("answers that stand above, packaged", DEMO, quoted, 128, {}, 1.4),
        ("answers that are drawn, packaged", DEMO, texts, 128, drawn, 0.97),
        (f"answers to nonsense, {DENSE}", DENSE, other, 64, {}, 0.97),
    )
    for what, name, prompts, out, extra, least in cases:
        with bench.server(name) as server:
            ways = [target_of(server, **extra, speculate=way) for way in ("off", "lookup")]
            for way in ways:
                answered(way, prompts[0], out)
            gains, drafts = [], server.metrics()
            for ids in prompts:
                plain, drafted = (answered(way, ids, out) for way in ways)
                gains.append((plain.ended - plain.due) / (drafted.ended - drafted.due))
            told = {
                word: sum(
                    value - drafts[key]
                    for key, value in server.metrics().items()
                    if key.startswith(f"quintet_spec_{word}_tokens_total")
                )
                for word in ("drafted", "accepted")
            }
        gain = statistics.median(gains)
        what = f"lookup beside none: {what}"
        yield Finding("T11", what, least, gain, least=True, more={"each": gains, **told})


def start_and_rest(bench: Bench) -> Iterator[Finding]:
    """T12: how long after a load of the model a server is ready, and what it takes when idle."""
    code = (
        "import sys; from quintet import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    )
    waits = []
    for _ in range(bench.rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, str(bench.path(DENSE))], check=True)
        loaded = time.perf_counter() - began
        with bench.server(DENSE) as server:
            waits.append(server.seconds - loaded)
            time.sleep(2)
            before = processor_seconds(server.process.pid)
            time.sleep(REST)
            share = (processor_seconds(server.process.pid) - before) / REST
    what = f"ready behind a process that loads {DENSE}"
    yield Finding("T12", what, 1, statistics.median(waits), unit=" s", more={"each": waits})
    yield Finding("T12", "of a core while idle", 0.01, share)


TARGETS: dict[str, Callable[[Bench], Iterator[Finding]]] = {
    "T2": one_client,
    "T4": first_token,
    "T5": long_prompt,
    "T6": conversation,
    "T7": short_prompts,
    "T9": crowd,
    "T11": looked_up,
    "T12": start_and_rest,
}


def main() -> None:
    """Parse the options, measure, write, and end with 1 where something is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_targets",
        description="Measure what a server was to reach, on real processes.",
    )
    parser.add_argument("--only", metavar="REGEX", help="targets whose number matches")
    parser.add_argument("--models", metavar="REGEX", default="", help="of T6, with their caches")
    parser.add_argument("--rounds", type=int, default=4, help="of everything (4)")
    parser.add_argument("--threads", type=int, default=Machine.here().cores)
    parser.add_argument(
        "--files",
        type=Path,
        default=Path.home() / ".cache" / "quintet-benchmarks" / "served",
        help="where checkpoints are kept",
    )
    parser.add_argument("--out", type=Path, help="results/serving-targets-DATE.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.files, options.threads, options.rounds, options.models)
    findings = []
    with MachineLoad() as load:
        for name, measure in TARGETS.items():
            if options.only and not re.fullmatch(options.only, name):
                continue
            for finding in measure(bench):
                findings.append(finding)
                print(finding.row, flush=True)
    out = options.out or RESULTS / f"serving-targets-{time.strftime('%Y-%m-%d')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "kind": "serving targets",
        "findings": [{**asdict(one), "met": one.met} for one in findings],
        "threads": options.threads,
        "load_average": load.facts()["load_average"],
        **about(["python", "-m", "benchmarks.serving_targets", *sys.argv[1:]]),
        "time": now(),
    }
    out.write_text(json.dumps(result, indent=1, default=float) + "\n")
    print(f"\n{table(findings)}\n\n{out}")
    sys.exit(not all(one.met for one in findings))


if __name__ == "__main__":
    main()
