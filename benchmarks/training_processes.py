"""A training in two processes beside the same in one: `python -m benchmarks.training_processes`.

The packaged model's geometry learns from the modules of Python's standard library. Both go some
steps, one after the other, and on again from their checkpoints, so that what else the machine does
falls upon both alike.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from quintet import demo_model
from quintet.training.config import TrainingConfig
from quintet.training.metrics import read_metrics
from quintet.training.settings import build, written

__all__ = ["main"]

RECIPE = Path(__file__).parents[1] / "examples" / "stdlib.toml"


def settings(
    folder: Path, steps: int, tokens: int, parallel: dict[str, Any], parts: int
) -> TrainingConfig:
    """Return the settings of a training of the packaged model's geometry."""
    values = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    library = sysconfig.get_path("stdlib")
    values["tokenizer"] = {"from": str(demo_model())}
    values["data"] = {
        "sources": [{"paths": [f"{library}/{name}.py" for name in ("argparse", "ast", "typing")]}],
        "context": 256,
        "batch_tokens": tokens,
        "cache": str(folder.parent / "cache"),
    }
    values["optimizer"] = {"learning_rate": 1e-3, "schedule": {"kind": "linear", "warmup": 0.1}}
    values["objective"], values["balance"] = {"prediction": 0.3}, {"bias": 0.001}
    values["train"] = {"folder": str(folder), "steps": steps, "seed": 1, "parts": parts}
    values["evaluation"] = {}
    values["report"] = {"peak_flops": 1e12}
    values["parallel"] = parallel
    return build(TrainingConfig, values)


def run(config: TrainingConfig, processes: int, threads: int, until: int) -> None:
    """Go on with a training until some step, by the command."""
    folder = Path(config.train.folder)
    path = folder.with_suffix(".toml")
    path.write_text(written(config), encoding="utf-8")
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    command = [
        *start,
        "quintet",
        "train",
        str(path),
        "--quiet",
        "--set",
        f"train.threads={threads}",
    ]
    command += ["--set", f"train.steps={until}"]
    if folder.exists():
        command.append("--resume-changed")
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def main() -> None:
    """Compare them, and print losses and tokens a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2, help="of the one process")
    parser.add_argument("--axis", default="fsdp", choices=["fsdp", "dp", "tp", "pp"])
    parser.add_argument("--parts", type=int, default=1, help="of a step; for pp several times 2")
    given = parser.parse_args()
    root = Path(mkdtemp())
    parallel = {"fsdp": 1, given.axis: 2}
    contenders = {"one": ({}, 1, given.threads), "two": (parallel, 2, 1)}
    ends = [given.steps * (turn + 1) // given.turns for turn in range(given.turns)]
    for end in ends:
        for name, (axes, processes, threads) in contenders.items():
            config = settings(root / name, given.steps, given.batch_tokens, axes, given.parts)
            run(config, processes, threads, end)
    told = {}
    for name in contenders:
        steps = [line for line in read_metrics(root / name) if line["event"] == "step"]
        # The first step behind each start makes room and kernels.
        begins = {1, *(end + 1 for end in ends)}
        speeds = [s["tokens_per_second"] for s in steps if s["step"] not in begins]
        last = [s["terms"]["next_token"] for s in steps[-10:]]
        told[name] = {
            "tokens_per_second": statistics.median(speeds),
            "loss": statistics.mean(last),
            "losses": [s["terms"]["next_token"] for s in steps],
        }
    one, two = told["one"], told["two"]
    differ = max(abs(a - b) for a, b in zip(one.pop("losses"), two.pop("losses"), strict=True))
    speed = two["tokens_per_second"] / one["tokens_per_second"]
    print(json.dumps({**told, "speed": speed, "largest_difference_of_losses": differ}, indent=1))


if __name__ == "__main__":
    main()
