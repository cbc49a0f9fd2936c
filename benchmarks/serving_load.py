"""Our server beside others under load: `python -m benchmarks.serving_load --minutes 30`."""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.files import model_path, warm
from benchmarks.servers import KINDS, Kind, Server, processor_seconds
from benchmarks.serving_files import servable
from quintet.errors import QuintetError
from quintet.measurement.machine import Machine, MachineLoad
from quintet.measurement.serving.workload import SHAPES

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# Shorter, and a cell is all beginning and end.
LEAST = 12.0
# Whoever is not idle so long after its clients went is started anew.
SETTLES = 60.0
# Whoever has so many cells without a result, one after the other, is left out.
PATIENCE = 2
# What is counted of a cell besides the median over its rounds.
SHOWN = (
    ("tok/s", lambda row: row["per_second"]["completion_tokens"]),
    ("first token, s", lambda row: (row["ttft"] or {}).get("p50")),
    ("gap p99, ms", lambda row: _ms((row["itl"] or {}).get("p99"))),
    ("cached", lambda row: _share(row["tokens"]["cached"], row["tokens"]["prompt"])),
)


@dataclass(slots=True)
class Seat:
    """A server, and how to start it again."""

    kind: Kind
    path: Path
    options: argparse.Namespace
    server: Server | None = None
    error: str | None = None
    failures: int = 0

    def open(self) -> None:
        """Start the server, if there is none that runs."""
        if self.error is None and self.server is None:
            print(f"starting {self.kind.name}", file=sys.stderr, flush=True)
            try:
                self.server = Server(
                    self.kind,
                    self.path,
                    rows=self.options.rows,
                    context=self.options.context,
                    threads=self.options.threads,
                    log=self.options.logs / f"{re.sub(r'[^a-zA-Z0-9]+', '-', self.kind.name)}.log",
                )
            except (OSError, RuntimeError) as error:
                self.error = str(error)
                print(f"{self.kind.name}: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End it."""
        if self.server is not None:
            self.server.close()
            self.server = None

    def measure(self, workload: str, clients: int, seconds: float, seed: int) -> dict[str, Any]:
        """Have so many clients ask it for so long, in a process of their own."""
        self.open()
        if self.server is None:
            return {"error": self.error}
        out = SHAPES[workload].out
        command = [
            sys.executable, "-m", "quintet", "bench", "serve", self.server.url, "--json", "--quiet",
            "--workload", workload, "--clients", str(clients), "--seconds", f"{seconds:.1f}",
            # A whole conversation of several turns would take as long as what is measured.
            "--warm", str(int(SHAPES[workload].turns == 1)),
            "--cut", "--seed", str(seed), "--timeout", str(SETTLES + 2 * seconds),
            "--body", json.dumps(self.server.body(out)), *self._name,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, timeout=4 * SETTLES + seconds
            )
        except subprocess.TimeoutExpired:
            return self._failed("no result in time")
        if done.returncode:
            return self._failed(done.stderr.strip()[-300:])
        self.failures = 0
        row = json.loads(done.stdout)
        row["memory"] = self.server.memory()
        if not self._settled():
            self.close()
            row["restarted"] = True
        return dict(row)

    def _failed(self, why: str) -> dict[str, Any]:
        """Give up a server that does not answer, and after some times what it is of."""
        self.close()
        self.failures += 1
        if self.failures >= PATIENCE:
            self.error = why
        return {"error": why}

    @property
    def _name(self) -> tuple[str, ...]:
        return () if self.kind.names else ("--model", str(self.path))

    def _settled(self) -> bool:
        """Tell if it answers someone alone, so that nothing of the last cell goes on."""
        assert self.server is not None
        command = [
            sys.executable, "-m", "quintet", "bench", "serve", self.server.url, "--json", "--quiet",
            "--clients", "1", "--requests", "1", "--warm", "0", "--shared", "0", "--own", "4",
            "--out", "1", "--timeout", str(SETTLES), "--body", json.dumps(self.server.body(1)),
            *self._name,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.returncode == 0 and json.loads(done.stdout)["requests"]["answered"] == 1


def main() -> None:
    """Parse the options and run."""
    options = _options()
    kinds = [
        kind
        for kind in KINDS
        if (re.search(options.only, kind.name) if options.only else kind.usual)
    ]
    if options.list:
        for kind in kinds:
            print(f"{kind.name:32} {kind.missing or 'here'}")
        return
    began = time.monotonic()
    options.logs.mkdir(parents=True, exist_ok=True)
    options.files.mkdir(parents=True, exist_ok=True)
    checkpoint = options.model or servable(options.files, options.geometry)
    seats = [_seat(kind, checkpoint, options) for kind in kinds]
    for seat in seats:
        if seat.error:
            print(f"{seat.kind.name}: {seat.error}", file=sys.stderr)
    seats = [seat for seat in seats if seat.error is None]
    out = options.out or RESULTS / f"serving-{time.strftime('%Y-%m-%d')}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for seat in seats:
            warm(seat.path)
            seat.open()
        for record in _rows(seats, options, began + 60 * options.minutes):
            with out.open("a") as file:
                file.write(json.dumps({**record, **_about(options), "time": now()}) + "\n")
            print(_line(record), flush=True)
    finally:
        for seat in seats:
            seat.close()
        if out.is_file():
            out.with_suffix(".md").write_text(render(read(out)))


def _rows(
    seats: Sequence[Seat], options: argparse.Namespace, until: float
) -> Iterator[dict[str, Any]]:
    """Measure one after the other: all cells once, and then all of them once more."""
    cells = list(product(options.workloads, options.clients))
    left = options.rounds * len(cells) * len(seats)
    for turn, (workload, clients), seat in product(range(options.rounds), cells, seats):
        # What is left, for what is left: warming up and settling take some of it, too.
        share = 0.75 * (until - time.monotonic()) / left
        if until - time.monotonic() < LEAST:
            return
        left -= 1
        with MachineLoad(lambda: _used(seats)) as load:
            row = seat.measure(workload, clients, max(LEAST, share), seed=turn)
        yield {
            "kind": "serving",
            "contender": seat.kind.name,
            "round": turn,
            "workload": workload,
            "clients": clients,
            **row,
            "load_on_machine": load.facts(),
        }


def _seat(kind: Kind, checkpoint: Path, options: argparse.Namespace) -> Seat:
    """Return the place of a server, with the reason where it cannot take part."""
    try:
        return Seat(kind, _path(kind, checkpoint, options), options, error=kind.missing)
    except (QuintetError, RuntimeError) as error:
        return Seat(kind, checkpoint, options, error=str(error))


def _path(kind: Kind, checkpoint: Path, options: argparse.Namespace) -> Path:
    """Return what a server loads, writing it if it is not there."""
    if kind.missing or kind.weights == "bf16":
        return checkpoint
    if options.model is not None:
        from benchmarks.gguf_files import convert

        return convert(
            checkpoint, options.files / f"{checkpoint.name}-{kind.weights}.gguf", kind.weights
        )
    return model_path(options.files, options.geometry, "llama.cpp", kind.weights)


def _used(seats: Iterable[Seat]) -> float:
    """Return the processor time of all that belongs to this run."""
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = sum(processor_seconds(s.server.process.pid) for s in seats if s.server is not None)
    return time.process_time() + children.ru_utime + children.ru_stime + running


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_on_disk": str(options.model.name if options.model else options.geometry),
        "rows": options.rows,
        "context": options.context,
        "threads": options.threads,
        **about(["python", "-m", "benchmarks.serving_load", *sys.argv[1:]]),
    }


def about(command: Sequence[str]) -> dict[str, Any]:
    """Say what produced a result."""
    return {
        "machine": asdict(Machine.here()),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "command": shlex.join(command),
    }


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def now() -> str:
    """Return the time, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _line(record: dict[str, Any]) -> str:
    head = f"{record['workload']:12} {record['clients']:3} clients  {record['contender']:30}"
    if "error" in record:
        return f"{head} {record['error']}"
    shown = ", ".join(f"{name} {_cell(of(record))}" for name, of in SHOWN)
    return f"{head} {shown}, failed {record['requests']['failed']}"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def render(records: Sequence[dict[str, Any]]) -> str:
    """Return tables in Markdown: a row for each number of clients, medians over rounds."""
    lines = ["# Servers under load", ""]
    models = dict.fromkeys(record["model_on_disk"] for record in records)
    workloads = dict.fromkeys(record["workload"] for record in records)
    for model, workload in product(models, workloads):
        of = [r for r in records if r["model_on_disk"] == model and r["workload"] == workload]
        if not of:
            continue
        names = list(dict.fromkeys(record["contender"] for record in of))
        for title, value in SHOWN:
            lines += [
                f"## {model}, {workload}: {title}",
                "",
                f"| clients | {' | '.join(names)} |",
                f"|---|{'---|' * len(names)}",
            ]
            for clients in sorted({record["clients"] for record in of}):
                cells = []
                for name in names:
                    found = [
                        value(record)
                        for record in of
                        if (record["contender"], record["clients"]) == (name, clients)
                        and "error" not in record
                    ]
                    known = [one for one in found if one is not None]
                    cells.append(_cell(statistics.median(known)) if known else "-")
                lines.append(f"| {clients} | {' | '.join(cells)} |")
            lines.append("")
    busy = [r["load_on_machine"]["others"] for r in records if r["load_on_machine"]["others"]]
    if busy:
        lines.append(f"Others took up to {max(busy):.0%} of the processor meanwhile.")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_load",
        description="Measure servers of one model in turns, each row written as it is made.",
    )

    def numbers(text: str) -> list[int]:
        return [int(one) for one in text.split(",")]

    parser.add_argument("--minutes", type=float, default=30, help="for all of it (30)")
    parser.add_argument("--geometry", default="qwen2-0.5b", help="random weights of this shape")
    parser.add_argument("--model", type=Path, help="a checkpoint instead")
    parser.add_argument("--clients", type=numbers, default=[1, 4, 8, 16, 32], metavar="N,N,…")
    parser.add_argument(
        "--workloads",
        type=lambda text: text.split(","),
        default=["chat"],
        metavar="NAME,NAME,…",
        help=f"of {', '.join(SHAPES)} (chat)",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="answers at once, of each server (16)")
    parser.add_argument("--context", type=int, help="tokens of each of them (what workloads need)")
    parser.add_argument("--threads", type=int, default=Machine.here().cores)
    parser.add_argument("--only", metavar="REGEX", help="servers whose name matches")
    parser.add_argument("--list", action="store_true", help="show the servers and stop")
    parser.add_argument(
        "--files",
        type=Path,
        default=Path.home() / ".cache" / "quintet-benchmarks" / "served",
        help="where checkpoints are kept",
    )
    parser.add_argument(
        "--logs", type=Path, default=Path("/tmp/quintet-serving-load"), help="of the servers"
    )
    parser.add_argument("--out", type=Path, help="of the results (results/serving-DATE.jsonl)")
    options = parser.parse_args()
    unknown = set(options.workloads) - set(SHAPES)
    if unknown:
        parser.error(f"there is no workload {', '.join(sorted(unknown))}")
    if options.context is None:
        # Words are not counted as exactly as ids.
        most = max(SHAPES[name].most for name in options.workloads)
        options.context = -(-(most + 64) // 256) * 256
    return options


if __name__ == "__main__":
    main()
