"""What a machine with a GPU shows in minutes: every family against the CPU, then how fast it runs.

    make gpu-check                                  on the machine, with torch and pytest there
    python -m benchmarks.gpu --device cpu --tiny    the same, to try it without one

Needs nothing from the network: weights are random and made on the device. Writes one file,
`gpu-<date>.md`, into `--out`. What the minutes did not suffice for is named in it.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from quintet.configuration import PreTrainedConfig
from quintet.measurement.geometries import geometry
from quintet.measurement.synthetic import random_model
from quintet.measurement.timing import time_prompt, time_steps
from quintet.modeling.heads import CausalLMHead
from quintet.modeling.sizes import Size, measure

NAMES = (
    "qwen2-0.5b",
    "qwen2-7b",
    "deepseek-v2-lite",
    "qwen1.5-moe-a2.7b",
    "zamba2-1.2b",
    "zamba2-7b",
)
PROMPT, DEPTHS, BATCHES = 4096, (512, 4096), (1, 8, 32)
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: of the geometry.
        case: what was timed.
        seconds: of a prompt, or of a step.
        tokens: that these are of.
        read: bytes of weights and cache that a step has to read at the least; 0 of a prompt.
    """

    name: str
    case: str
    seconds: float
    tokens: int
    read: int = 0


def bandwidth(device: torch.device) -> float:
    """Return how many bytes a second the device reads, of the fastest of some sums."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**24, dtype=torch.bfloat16, device=device)
    times = []
    for _ in range(6):
        wait(device)
        started = time.perf_counter()
        x.sum()
        wait(device)
        times.append(time.perf_counter() - started)
    return x.nbytes / min(times)


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(
    name: str, config: PreTrainedConfig, device: torch.device, small: int, until: float
) -> Iterator[Row]:
    """Yield the rows of a geometry, as long as there is time."""
    model = random_model(config, torch.bfloat16, device=device)
    size = measure(model, torch.bfloat16)
    prompt = PROMPT // small
    time_prompt(model, 1, 64)
    seconds = statistics.median(time_prompt(model, 1, prompt) for _ in range(3))
    yield Row(name, f"prompt of {prompt}", seconds, prompt)
    for depth in DEPTHS:
        for batch in BATCHES:
            if time.monotonic() > until:
                return
            yield step(model, name, size, batch, depth // small)


def step(model: CausalLMHead, name: str, size: Size, batch: int, depth: int) -> Row:
    """Return the row of steps of a batch behind a context."""
    seconds = time_steps(model, batch, depth, steps=24, limit=2.0)
    # Of experts those of one token: more rows choose more, how many is chance.
    read = 2 * size.active + size.cache_bytes(batch, depth, 2)
    return Row(name, f"batch {batch} behind {depth}", seconds, batch, read)


def checks(device: str, limit: float) -> str:
    """Run the tests of the device, and return what they say at their end."""
    env = {**os.environ, "QUINTET_GPU_CHECK": device, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["tests/gpu", "--maxfail=40", "--durations=5"]
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=env, timeout=limit, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        text = said.decode() if isinstance(said, bytes) else said
        return f"{text[-2000:]}\nended after {limit:.0f} s"
    print(ended.stdout[-12_000:], flush=True)
    lines = ended.stdout.splitlines()
    return "\n".join(x[:200] for x in lines if re.match(r"FAILED|ERROR|\d+ (passed|failed)", x))


def main() -> None:
    """Run the checks and the figures, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tiny", action="store_true", help="two layers, short contexts")
    asked = parser.parse_args()
    began = time.monotonic()
    until = began + 60 * asked.minutes
    device = torch.device(asked.device)
    said = checks(asked.device, 30 * asked.minutes)
    rows: list[Row] = []
    missing: list[str] = []
    for name in NAMES:
        if time.monotonic() > until:
            missing.append(name)
            continue
        config = geometry(name).config()
        if asked.tiny:
            config = type(config)(num_hidden_layers=2, vocab_size=1000)
        try:
            for row in measured(name, config, device, 64 if asked.tiny else 1, until):
                rows.append(row)
                print(row, flush=True)
        except Exception as error:  # What one geometry meets keeps the others from nothing.
            missing.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    speed = bandwidth(device)
    lines = [
        f"# {what}, {date.today()}",
        "",
        f"torch {torch.__version__}, {speed / 1e9:,.0f} GB/s read, bfloat16, random weights, "
        f"`make gpu-check`, {(time.monotonic() - began) / 60:.1f} minutes",
        "",
        "```",
        said or "no test ran",
        "```",
        "",
        "| geometry | case | ms | tokens/s | of the bandwidth |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        share = f"{row.read / speed / row.seconds:.2f}" if row.read else ""
        lines.append(
            f"| {row.name} | {row.case} | {1e3 * row.seconds:.2f} | "
            f"{row.tokens / row.seconds:,.0f} | {share} |"
        )
    lines += ["", *(f"not measured: {what}" for what in missing)]
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"gpu-{date.today()}.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\nwritten to {path}")


if __name__ == "__main__":
    main()
