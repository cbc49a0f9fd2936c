"""Run cases in turns and add their results to a file: `python -m benchmarks --help`."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import files, report
from benchmarks.suite import CASES, Case
from benchmarks.turns import Settings, run
from quintet.measurement.machine import Machine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parse the options and run."""
    options = _options()
    chosen = [case for case in CASES if not options.only or re.search(options.only, case.name)]
    chosen = [_with(case, options.peers) for case in chosen]
    chosen = [case for case in chosen if case.contenders]
    if options.list:
        for case in chosen:
            print(f"{case.name:45} {', '.join(c.name for c in case.contenders)}")
        return
    if not chosen:
        sys.exit("no case is left of --only and --peers; --list shows them all")
    if options.prepare:
        for geometry, contender in dict.fromkeys(
            (case.geometry, c) for case in chosen for c in case.contenders
        ):
            files.model_path(options.files, geometry, contender.peer, contender.weights)
        return
    out = options.out or RESULTS / f"{time.strftime('%Y-%m-%d')}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    settings = Settings(
        folder=options.files,
        threads=options.threads,
        repeats=options.repeats,
        rounds=options.rounds,
        in_time=lambda: options.limit is None or time.monotonic() - began < options.limit,
    )
    facts = about(options.threads)
    left = [case.name for case in chosen]
    for session in _sessions(chosen):
        if not settings.in_time():
            break
        for record in run(session, settings):
            with out.open("a") as file:
                file.write(json.dumps({**record, **facts, "time": _now()}) + "\n")
            print("\n".join(report.lines(record)), flush=True)
            left.remove(record["case"])
    out.with_suffix(".md").write_text(report.render(report.read([out])))
    if left:
        print(f"out of time, not measured: {', '.join(left)}")


def about(threads: int) -> dict[str, Any]:
    """Say what produced a result."""
    return {
        "machine": asdict(Machine.here()),
        "threads": threads,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure ours beside the peers, in turns."
    )
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--peers", metavar="REGEX", help="contenders whose name matches")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement (5)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="of models that do not fit together (2)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit", type=float, metavar="S", help="begin nothing after S seconds")
    parser.add_argument(
        "--files",
        type=Path,
        default=Path.home() / ".cache" / "quintet-benchmarks",
        help="where random checkpoints are kept, some 60 GB for all",
    )
    parser.add_argument("--out", type=Path, help="of the results (benchmarks/results/DATE.jsonl)")
    parser.add_argument("--prepare", action="store_true", help="write the checkpoints and stop")
    parser.add_argument("--list", action="store_true", help="show the cases and stop")
    return parser.parse_args()


def _with(case: Case, peers: str | None) -> Case:
    kept = tuple(c for c in case.contenders if not peers or re.search(peers, c.name))
    return Case(case.geometry, case.kind, case.tokens, case.batch, kept, case.steps)


def _sessions(cases: Sequence[Case]) -> Iterable[list[Case]]:
    """Group the cases for which the same models are held."""
    groups: dict[Any, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.geometry, case.contenders, case.kind == "load"), []).append(case)
    return groups.values()


if __name__ == "__main__":
    main()
