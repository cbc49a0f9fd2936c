"""Steps of training beside Transformers: `python -m benchmarks.training --help`.

A step is forward, loss, backward and AdamW, of the same weights on the same ids. Both contenders
hold their model at once and take turns, step by step. Memory is measured in processes of their own
whose allocator gives back what is freed, as the most that was held within a second step, beyond
what was held before it: weights and the optimiser's moments, which are alike.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.__main__ import RESULTS, about
from benchmarks.training_models import MODELS, directory
from benchmarks.turns import Worker
from quintet.measurement.machine import MachineLoad

__all__ = ["Case", "main"]

OURS, THEIRS = "quintet", "transformers"
# What a step has to be at least, in Transformers' steps.
TARGETS = {"qwen2-30m": 1.0, "qwen2-moe": 1.5, "deepseek-v2": 1.5, "deepseek-v3": 1.5}
TARGETS["zamba2-30m"] = 2.0
# glibc: every tensor of 64 kB has pages of its own, which go back with it.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "10000000"}
# Who holds mamba's states apart, or attention, where several texts are in a row.
PACKS = {OURS: set(MODELS), THEIRS: set(MODELS) - {"zamba2-30m"}}


@dataclass(frozen=True, slots=True)
class Case:
    """What a step is of.

    Attributes:
        model: a name in `benchmarks.training_models`.
        context: the length of a row.
        amp: autocast to bfloat16; else float32.
        recompute: gradient checkpointing, of every layer.
        texts: in a row.
    """

    model: str
    context: int
    amp: bool
    recompute: bool
    texts: int = 1

    @property
    def name(self) -> str:
        """What identifies it in the results."""
        texts = f" {self.texts} texts" if self.texts > 1 else ""
        kind = "bfloat16" if self.amp else "float32"
        return f"{self.model} {self.context}{texts} {kind}{' recompute' if self.recompute else ''}"

    def order(self) -> dict[str, Any]:
        """Return what a worker is told."""
        order = asdict(self)
        del order["model"]
        return order


CASES = [
    *(
        Case(model, context, amp, recompute)
        for model, context, amp, recompute in product(
            MODELS, (512, 2048), (False, True), (False, True)
        )
    ),
    *(Case(model, 2048, amp, False, 16) for model, amp in product(MODELS, (False, True))),
]


def main() -> None:
    """Parse the options and run."""
    options = _options()
    cases = [case for case in CASES if not options.only or re.search(options.only, case.name)]
    if options.list:
        print("\n".join(case.name for case in cases))
        return
    if not cases:
        sys.exit("no case is left of --only; --list shows them all")
    out = options.out or RESULTS / f"training-{time.strftime('%Y-%m-%d')}.jsonl"
    facts = {**about(options.threads), "tokens": options.tokens}
    facts["command"] = shlex.join(["python", "-m", "benchmarks.training", *sys.argv[1:]])
    for model in dict.fromkeys(case.model for case in cases):
        for record in _measured(model, [c for c in cases if c.model == model], options):
            with out.open("a") as file:
                file.write(json.dumps({**record, **facts}) + "\n")
            print(_line(record), flush=True)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    out.with_suffix(".md").write_text("\n".join(_table(records)) + "\n")


def _measured(
    model: str, cases: Sequence[Case], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    path = directory(options.files, model)
    workers = {name: _worker(name, path, options) for name in (OURS, THEIRS)}
    try:
        for case in cases:
            kept: dict[str, Any] = {
                name: [] for name, packs in PACKS.items() if _takes(case, packs)
            }
            with MachineLoad(lambda: sum(w.processor_seconds() for w in workers.values())) as load:
                # The first of each warms up.
                for seed in range(options.rounds + 1):
                    for name, steps in kept.items():
                        steps.append(_step(workers[name], case, options.tokens, seed))
            results = {name: _summary(steps) for name, steps in kept.items()}
            if options.memory:
                for name, result in results.items():
                    result["above"] = _above(name, path, case, options)
            yield {"case": case.name, "results": results, "conditions": load.facts()}
    finally:
        for worker in workers.values():
            worker.close()


def _takes(case: Case, packs: set[str]) -> bool:
    return case.texts == 1 or case.model in packs


def _worker(name: str, path: Path, options: argparse.Namespace, **environment: str) -> Worker:
    worker = Worker(f"training {name}", "float32", options.threads, environment)
    answer = worker.ask("load", path=str(path))
    if "error" in answer:
        sys.exit(f"{name}: {answer['error']}")
    return worker


def _step(worker: Worker, case: Case, tokens: int, seed: int) -> dict[str, Any]:
    answer = worker.ask("step", tokens=tokens, seed=seed, **case.order())
    if "error" in answer:
        sys.exit(f"{case.name}: {answer['error']}")
    return answer


def _summary(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "loss": steps[0]["loss"],
        **{k: [step[k] for step in steps[1:]] for k in ("seconds", "processor_seconds")},
    }


def _above(name: str, path: Path, case: Case, options: argparse.Namespace) -> int:
    worker = _worker(name, path, options, **EXACT)
    try:
        return int([_step(worker, case, options.tokens, seed)["above"] for seed in (1, 2)][-1])
    finally:
        worker.close()


def _ratios(record: Mapping[str, Any], what: str) -> float | None:
    """Return the median over the rounds of theirs by ours; None where one of them is missing."""
    results = record["results"]
    if THEIRS not in results or what not in results[OURS]:
        return None
    ours, theirs = results[OURS][what], results[THEIRS][what]
    if isinstance(ours, int):
        return float(theirs / ours)
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def _line(record: Mapping[str, Any]) -> str:
    cells = [record["case"]]
    for name, result in record["results"].items():
        cells.append(f"{name} {_cell(result)}")
    named = (("seconds", "clock"), ("processor_seconds", "processor"), ("above", "memory"))
    for what, called in named:
        ratio = _ratios(record, what)
        if ratio is not None:
            cells.append(f"{called} {ratio:.2f}x")
    return "; ".join(cells)


def _cell(result: Mapping[str, Any]) -> str:
    clock, processor = (statistics.median(result[k]) for k in ("seconds", "processor_seconds"))
    above = f", {result['above'] / 2**20:.0f} MiB" if "above" in result else ""
    return f"{clock:.2f} s ({processor:.2f}){above}"


def _table(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    newest = {record["case"]: record for record in records}
    last = records[-1]
    yield "# A step of training beside Transformers"
    yield ""
    yield f"{last['machine']['cpu']}, {last['threads']} threads, torch {last['machine']['torch']}; "
    yield "seconds by the clock (of the processor), memory above weights and moments; medians."
    yield "Commits: " + ", ".join(dict.fromkeys(r["commit"] for r in newest.values())) + "."
    yield ""
    yield "| case | ours | Transformers | clock | processor | asked | memory | others |"
    yield "|---|---|---|---|---|---|---|---|"
    for case, record in newest.items():
        ratios = [_ratios(record, what) for what in ("seconds", "processor_seconds", "above")]
        clock, processor, memory = ("" if x is None else f"{x:.2f}" for x in ratios)
        theirs = record["results"].get(THEIRS)
        others = record["conditions"]["others"]
        yield (
            f"| {case} | {_cell(record['results'][OURS])} | {_cell(theirs) if theirs else ''} | "
            f"{clock} | {processor} | {TARGETS[case.split()[0]]} | {memory} | "
            f"{'unknown' if others is None else f'{others:.0%}'} |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description="Steps of training beside Transformers."
    )
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--rounds", type=int, default=5, help="of steps in turns (5)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step (4096)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="time alone")
    parser.add_argument(
        "--files",
        type=Path,
        default=Path.home() / ".cache" / "quintet-benchmarks",
        help="where random checkpoints are kept",
    )
    parser.add_argument("--out", type=Path, help="(benchmarks/results/training-DATE.jsonl)")
    parser.add_argument("--list", action="store_true", help="show the cases and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
