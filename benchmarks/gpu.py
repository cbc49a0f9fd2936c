"""What a machine with a GPU shows in 8 minutes: what runs there against the CPU, then how fast.

    make gpu-check                                  on the machine, with torch and pytest there
    python -m benchmarks.gpu --device cpu --tiny    the same, to try it without one

First the kernels and every family against their definitions on the CPU, then steps and prompts of
released geometries. Needs nothing from the network: weights are random and made on the device.
Writes one file, `gpu-<date>.md`, into `--out`, line by line, so that whatever ends it leaves what
was found. What the minutes did not suffice for is named in it; when they are over, it ends itself.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.gpu_rows import Missing, Row, bandwidth, measured, transformers
from quintet.backends import REGISTRY
from quintet.configuration import PreTrainedConfig
from quintet.measurement.geometries import geometry

# What is aimed at with one row, in tokens a second; most of it stands behind graphs.
GOALS = {
    "qwen2-0.5b": 1000,
    "qwen2-7b": 220,
    "qwen1.5-moe-a2.7b": 350,
    "deepseek-v2-lite": 300,
    "zamba2-1.2b": 350,
    "zamba2-7b": 0,
}
HEAD = (
    "| geometry | case | way | ms | tokens/s | goal | kernels | of the bandwidth |",
    "|---|---|---|---|---|---|---|---|",
)
ROOT = Path(__file__).parents[1]
# Seconds that tests may take, of those there are; and those that the end is put off by, so that a
# row under way is told of.
TESTING, GRACE = 0.35, 30.0


class Report:
    """A file that has every line as soon as it is there."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, *lines: str) -> None:
        """Add lines, here and to the file."""
        for line in lines:
            print(line, flush=True)
            self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def told(row: Row | Missing, speed: float) -> str:
    """Return a figure as a line, of a device that reads so many bytes a second."""
    if isinstance(row, Missing):
        return f"| {row.name} | {row.case} | {row.why.splitlines()[0]} | | | | | |"
    rate = row.tokens / row.seconds
    goal = GOALS.get(row.name, 0) if row.case.startswith("batch 1 ") else 0
    reached = f"{goal:,} {'reached' if rate >= goal else 'missed'}" if goal else ""
    share = f"{row.read / speed / row.seconds:.2f}" if row.read else ""
    kernels = "" if row.kernels is None else str(row.kernels)
    return (
        f"| {row.name} | {row.case} | {row.way} | {1e3 * row.seconds:.2f} | {rate:,.0f} | "
        f"{reached} | {kernels} | {share} |"
    )


def checks(device: str, limit: float, tests: str, marks: str) -> str:
    """Run tests on the device, those of some marks, and return what they say at their end."""
    env = {**os.environ, "QUINTET_GPU_CHECK": device, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "pytest", "-v", "-m", marks, "-p", "no:cacheprovider"]
    command += [tests, "--maxfail=40", "--durations=5"]
    over = None
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=env, timeout=limit, capture_output=True, text=True
        )
        said = ended.stdout
    except subprocess.TimeoutExpired as error:
        so_far, over = error.stdout or b"", limit
        said = so_far.decode() if isinstance(so_far, bytes) else so_far
    print(said[-12_000:], flush=True)
    return outcome(said, over)


def outcome(said: str, over: float | None = None) -> str:
    """Return what failed and how many tests ended, of what pytest says with -v.

    Args:
        said: all of it, or what it came to say.
        over: the seconds it had, where it was ended; None where it came to its end.
    """
    if over is None:
        told = re.findall(r"^(?:FAILED|ERROR) .*|^=+ .* in [\d.]+s.*", said, re.M)
    else:
        told = re.findall(r"^.*::.* (?:FAILED|ERROR)\b.*", said, re.M)
        ended = len(re.findall(r"^.*::.* (?:PASSED|FAILED|ERROR|SKIPPED)\b", said, re.M))
        told.append(f"{ended} tests ended within {over:.0f} s; there was no time for the others")
    return "\n".join(line.strip("= ")[:200] for line in told)


def figures(
    configs: dict[str, PreTrainedConfig], device: torch.device, small: int, until: float
) -> Iterator[Row | Missing]:
    """Yield the figures of all geometries, each within its share of the time, then of peers."""
    for number, (name, config) in enumerate(configs.items()):
        now = time.monotonic()
        # What one does not need is for those behind it.
        share = now + (until - now) / (len(configs) - number)
        yield from _of(name, measured(name, config, device, small, share), device)
    for name, config in configs.items():
        if time.monotonic() < until:
            yield from _of(name, transformers(name, config, device, small, until), device)


def _of(name: str, rows: Iterator[Row | Missing], device: torch.device) -> Iterator[Row | Missing]:
    """Yield rows, and what ended them if anything did; free what they took."""
    try:
        yield from rows
    except Exception as error:  # What one geometry meets keeps the others from nothing.
        yield Missing(name, "all", f"{type(error).__name__}: {str(error)[:300]}")
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Run the checks and the figures, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tiny", action="store_true", help="two layers, short contexts")
    parser.add_argument("--no-tests", action="store_true", help="how fast it is alone")
    asked = parser.parse_args()
    began, seconds = time.monotonic(), 60 * asked.minutes
    # Whatever does not come back: what was found is in the file already.
    last = threading.Timer(seconds + GRACE, os._exit, [3])
    last.daemon = True
    last.start()
    device = torch.device(asked.device)
    cuda = device.type == "cuda"
    what = torch.cuda.get_device_name(device) if cuda else platform.processor()
    configs = {name: geometry(name).config() for name in GOALS}
    if asked.tiny:
        configs = {
            name: type(config)(num_hidden_layers=2, vocab_size=1000)
            for name, config in configs.items()
        }
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"gpu-{date.today()}.md"
    with path.open("w", encoding="utf-8") as file:
        report = Report(file)
        speed = bandwidth(device)
        report.write(
            f"# {what}, {date.today()}",
            "",
            f"torch {torch.__version__}, {speed / 1e9:,.0f} GB/s read, bfloat16, random weights, "
            f"`make gpu-check`; kernels of a step{'' if cuda else ' are operations of torch here'}",
        )
        told_of = (
            f"{one.name} ({one.missing() or 'there'})"
            for one in REGISTRY.backends
            if one.on_request
        )
        report.write("", f"Published kernels: {', '.join(told_of)}")
        if not asked.no_tests:
            for tests, marks in (("tests/triton/test_parity.py", ""), ("tests/gpu", "gpu")):
                said = checks(asked.device, TESTING / 2 * seconds, tests, marks)
                report.write("", "```", tests, said or "no test ran", "```")
        report.write("", *HEAD)
        small = 64 if asked.tiny else 1
        for row in figures(configs, device, small, began + seconds):
            report.write(told(row, speed))
        report.write("", f"{(time.monotonic() - began) / 60:.1f} minutes")
    last.cancel()
    print(f"written to {path}")


if __name__ == "__main__":
    main()
