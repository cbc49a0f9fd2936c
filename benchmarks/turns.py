"""Worker processes that take turns: while one measures, the others wait."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import files
from benchmarks.suite import Case, Contender
from quintet.measurement.machine import MachineLoad

__all__ = ["Settings", "Worker", "run"]

ROOT = Path(__file__).parents[1]
# What a process needs beside the weights: libraries, a cache, activations.
BESIDE = 800 * 2**20
# A step of a slow contender at a long context takes seconds; four of them tell enough.
STEPS_LIMIT = 10.0
WARM_UP = 512


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run is done.

    Attributes:
        folder: where checkpoints are.
        threads: of each contender.
        repeats: of each measurement.
        rounds: how often models that do not fit together are loaded in turns.
        in_time: whether another case may begin.
    """

    folder: Path
    threads: int
    repeats: int
    rounds: int
    in_time: Callable[[], bool]


class Worker:
    """A process that holds one contender; see `benchmarks.worker`."""

    def __init__(
        self, peer: str, weights: str, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", peer, weights, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**_environment(threads), **(environment or {})},
            text=True,
        )
        self.error: str | None = None
        answer = self._read()
        self.import_seconds: float | None = answer.get("import_seconds")
        self.error = answer.get("error")

    def ask(self, what: str, **order: Any) -> dict[str, Any]:
        """Have one thing done; nothing more is without a process or a model."""
        if self.error is not None:
            return {"error": self.error}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **order}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def processor_seconds(self) -> float:
        """Return what the process has used of the processor so far."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        self.error = f"the process ended with {self._process.wait()}"
        return {"error": self.error}


@dataclass(slots=True)
class _Seat:
    """A contender's place in a session, with what was measured of it."""

    contender: Contender
    path: Path
    loads: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def room(self) -> float:
        """Return the bytes that the contender takes at most, as far as one can tell before."""
        # Transformers stacks experts while it loads, and holds most weights twice meanwhile.
        copies = 1.8 if self.contender.peer == "transformers" else 1.0
        return copies * files.size_of(self.path) + BESIDE

    def open(self, settings: Settings) -> Worker:
        """Start a worker and have it load the model."""
        worker = Worker(self.contender.peer, self.contender.weights, settings.threads)
        answer = worker.ask("load", path=str(self.path))
        worker.error = answer.get("error")
        self.loads.append({**answer, "import_seconds": worker.import_seconds})
        return worker

    def measure(self, worker: Worker, case: Case, repeat: int) -> None:
        """Measure once."""
        result = self.results.setdefault(case.name, {"seconds": []})
        if not result["seconds"]:
            tokens = min(case.tokens, WARM_UP)
            if case.kind == "prefill":
                worker.ask("prefill", batch=case.batch, tokens=tokens, seed=99)
            result |= worker.ask("facts", kind=case.kind, batch=case.batch, tokens=case.tokens)
        order: dict[str, Any] = {"batch": case.batch, "seed": repeat}
        if case.kind == "prefill":
            answer = worker.ask("prefill", tokens=case.tokens, **order)
        else:
            answer = worker.ask(
                "decode", depth=case.tokens, steps=case.steps, limit=STEPS_LIMIT, **order
            )
        if "error" in answer:
            result["error"] = answer["error"]
        else:
            result["seconds"].append(answer["seconds"])
            result["peak_memory"] = answer["peak_memory"]


def run(cases: Sequence[Case], settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure cases of one geometry with the same contenders; yield a record of each."""
    seats = [
        _Seat(c, files.model_path(settings.folder, cases[0].geometry, c.peer, c.weights))
        for c in cases[0].contenders
    ]
    for seat in seats:
        files.warm(seat.path)
    if cases[0].kind == "load":
        yield _loads(cases[0], seats, settings)
    elif sum(seat.room() for seat in seats) < 0.9 * _free_memory():
        yield from _together(cases, seats, settings)
    else:
        yield from _apart(cases, seats, settings)


def _together(
    cases: Sequence[Case], seats: Sequence[_Seat], settings: Settings
) -> Iterator[dict[str, Any]]:
    """Hold all models at once and go from one to the next with every single measurement."""
    workers = [seat.open(settings) for seat in seats]
    limits = _Limits(settings.threads)
    try:
        for case in cases:
            if not settings.in_time():
                return
            with MachineLoad(lambda: _used([*workers, limits.worker])) as load:
                idle = []
                for repeat in range(settings.repeats):
                    limits.measure(case.kind)
                    for seat, worker in zip(seats, workers, strict=True):
                        others = [w for w in workers if w is not worker]
                        before, began = _used(others), time.perf_counter()
                        seat.measure(worker, case, repeat)
                        idle.append((_used(others) - before) / (time.perf_counter() - began))
            facts = {"turns": "every measurement", "idle": statistics.median(idle), **load.facts()}
            yield _record(case, seats, limits.take(), facts)
    finally:
        for worker in (*workers, limits.worker):
            worker.close()


def _apart(
    cases: Sequence[Case], seats: Sequence[_Seat], settings: Settings
) -> Iterator[dict[str, Any]]:
    """Hold one model at a time, and load each of them in several rounds."""
    limits = _Limits(settings.threads)
    used = 0.0
    with MachineLoad(lambda: used + time.process_time()) as load:
        for turn, seat in product(range(settings.rounds), seats):
            if not settings.in_time():
                break
            worker = seat.open(settings)
            for case in cases:
                for repeat in range(turn, settings.repeats, settings.rounds):
                    limits.measure("prefill")
                    seat.measure(worker, case, repeat)
            used += worker.processor_seconds()
            worker.close()
        used += limits.worker.processor_seconds()
    measured = limits.take()
    for case in cases:
        facts = {"turns": f"{settings.rounds} rounds, one model held at a time", **load.facts()}
        yield _record(case, seats, measured, facts)
    limits.worker.close()


def _loads(case: Case, seats: Sequence[_Seat], settings: Settings) -> dict[str, Any]:
    """Start a new process for every load."""
    limits = _Limits(settings.threads)
    limits.measure("load")
    used = limits.worker.processor_seconds()
    limits.worker.close()
    with MachineLoad(lambda: used + time.process_time()) as load:
        for _ in range(settings.repeats):
            for seat in seats:
                worker = seat.open(settings)
                used += worker.processor_seconds()
                worker.close()
    for seat in seats:
        result: dict[str, Any] = {"seconds": []}
        for answer in seat.loads:
            if "error" in answer:
                result["error"] = answer["error"]
            else:
                result["seconds"].append(answer["first_token_seconds"])
                result["peak_memory"] = answer["peak_memory"]
        seat.results[case.name] = result
    return _record(case, seats, limits.take(), {"turns": "a new process each", **load.facts()})


def _record(
    case: Case, seats: Sequence[_Seat], limits: dict[str, Any], conditions: dict[str, Any]
) -> dict[str, Any]:
    return {
        "case": case.name,
        **case.facts(),
        "results": {
            seat.contender.name: {
                **seat.results.get(case.name, {"seconds": [], "error": "out of time"}),
                "import_seconds": [answer["import_seconds"] for answer in seat.loads],
                "load_seconds": [answer.get("load_seconds") for answer in seat.loads],
            }
            for seat in seats
        },
        **limits,
        "conditions": conditions,
    }


class _Limits:
    """A worker that measures what the machine could do, between the others' turns."""

    def __init__(self, threads: int) -> None:
        self.worker = Worker("machine", "none", threads)
        self._found: dict[str, list[dict[str, Any]]] = {"bandwidth": [], "gemm": []}

    def measure(self, kind: str) -> None:
        """Measure what bounds a kind of case."""
        for what in ("bandwidth", "gemm") if kind != "load" else ("bandwidth",):
            self._found[what].append(self.worker.ask(what))

    def take(self) -> dict[str, Any]:
        """Return the medians since the last time."""
        bandwidth, gemm = self._found["bandwidth"], self._found["gemm"]
        self._found = {"bandwidth": [], "gemm": []}
        return {
            "bandwidth": {
                "bytes_per_second": statistics.median(x["bytes_per_second"] for x in bandwidth),
                "how": bandwidth[0]["how"],
                "each": [x["bytes_per_second"] for x in bandwidth],
            },
            "gemm_flops_per_second": statistics.median(x["flops_per_second"] for x in gemm)
            if gemm
            else None,
        }


def _environment(threads: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def _used(workers: Sequence[Worker]) -> float:
    return time.process_time() + sum(worker.processor_seconds() for worker in workers)


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
