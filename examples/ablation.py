"""An ablation: tiny DeepSeek-V3 models, with and without prediction loss, balanced in three ways.

    python examples/ablation.py --out runs/ablation --minutes 25

Six arms learn Python's standard library twice: once for so many minutes of the processor each,
once for so many steps each, namely those that the slowest arm took in its minutes. Both comparisons
are of equal compute, in two meanings: what a loss costs in time counts against it in the first,
and not in the second. Two trainings run at a time, with a thread each: about 12 × minutes / 2 in
all. Each arm is a training of `quintet.training`, whose folder has its settings, metrics and
checkpoints; run again, the command goes on with what is not finished.

It writes `results.jsonl`, a line a training, and prints them as a table; with matplotlib it draws
`minutes.png` and `steps.png`, and with `--docs` copies them and the table to docs/images and
docs/ablation.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from quintet import PreTrainedTokenizerFast, Qwen2Tokenizer
from quintet.errors import MissingDependencyError
from quintet.training import TrainingConfig, train
from quintet.training.building import build_tokenizer
from quintet.training.data import build_data
from quintet.training.evaluation import evaluate
from quintet.training.metrics import read_metrics
from quintet.training.plots import plot_png
from quintet.training.settings import build

END = "<|endoftext|>"
# What others installed, generated tables, and tests: what is learned are the modules themselves.
LEFT_OUT = ("site-packages", "encodings", "__pycache__", "test", "tests", "idle_test", "pydoc_data")
BALANCE: dict[str, dict[str, Any]] = {
    "bias": {"bias": {"kind": "deepseek-v3-bias"}},
    "auxiliary": {"auxiliary": 0.01},
    "none": {},
}
PREDICTION: dict[str, dict[str, Any]] = {
    "prediction": {"prediction": {"kind": "deepseek-v3-prediction"}},
    "next-token": {},
}
ARMS = [f"{prediction}-{balance}" for prediction in PREDICTION for balance in BALANCE]
SERIES = ("minutes", "steps")


def parts_of(arm: str) -> tuple[str, str]:
    """Return the objective and the way of balancing that an arm is named after."""
    prediction, _, balance = arm.rpartition("-")
    return prediction, balance


def settings(arm: str, series: str, budget: dict[str, float], options: argparse.Namespace) -> Any:
    """Return what an arm's training is told."""
    prediction, balance = parts_of(arm)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    patterns = [f"*/{name}/*" for name in LEFT_OUT]
    source = {"paths": [f"{stdlib}/**/*.py"], "exclude": patterns, "undecodable": "replace"}
    return build(
        TrainingConfig,
        {
            "model": {
                "config": {
                    "model_type": "deepseek_v3",
                    "hidden_size": 128,
                    "intermediate_size": 256,
                    "moe_intermediate_size": 64,
                    "n_routed_experts": 16,
                    "num_experts_per_tok": 4,
                    "n_shared_experts": 1,
                    "n_group": 1,
                    "topk_group": 1,
                    "routed_scaling_factor": 1.0,
                    "first_k_dense_replace": 1,
                    "num_hidden_layers": 4,
                    "num_nextn_predict_layers": int(prediction == "prediction"),
                    "num_attention_heads": 4,
                    "q_lora_rank": None,
                    "kv_lora_rank": 48,
                    "qk_nope_head_dim": 16,
                    "qk_rope_head_dim": 16,
                    "v_head_dim": 32,
                    "max_position_embeddings": 256,
                    "tie_word_embeddings": True,
                }
            },
            "tokenizer": {"from": str(options.out / "tokenizer")},
            "data": {
                "sources": [source],
                "context": 256,
                "batch_tokens": 4096,
                "windows": "random",
                "held_out": 0.05,
                "on_bad": "skip",
                "cache": str(options.out / "data"),
            },
            "objective": PREDICTION[prediction],
            "balance": BALANCE[balance],
            "optimizer": {
                "kind": "muon",
                "learning_rate": 3e-3,
                "schedule": {"kind": "linear", "warmup": 0.03},
                "precision": "autocast",
            },
            "train": {
                "folder": str(options.out / series / arm),
                "seed": options.seed,
                "threads": 1,
                **budget,
            },
            "evaluation": {"every": options.every, "documents": 8},
            "checkpoint": {"keep": 1},
        },
    )


def make_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer on the modules, unless it is there."""
    from tokenizers import AddedToken, trainers

    if (folder / "tokenizer.json").exists():
        return
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(stdlib.rglob("*.py")) if not {*path.parts} & {*LEFT_OUT}]
    backend = Qwen2Tokenizer(vocab={END: 0}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[AddedToken(END, special=True)],
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((p.read_text("utf-8", "replace") for p in paths), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=None, eos_token=END, pad_token=END, unk_token=None
    ).save_pretrained(folder)


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def run_arm(arm: str, series: str, budget: dict[str, float], options: argparse.Namespace) -> None:
    """Train an arm, or go on with it, and write down what came of it."""
    config = settings(arm, series, budget, options)
    folder = Path(config.train.folder)
    result = train(config, resume=(folder / "metrics.jsonl").exists())
    data = build_data(config.data, result.tokenizer)
    held_out = data.held_out[: options.documents]
    found = evaluate(result.model, held_out, data.context, step=result.step, tokens=result.tokens)
    steps = [line for line in read_metrics(folder) if line["event"] == "step"]
    late = [line["balance"].values() for line in steps[-len(steps) // 10 :]]
    line = {
        "series": series,
        "arm": arm,
        "bits_per_byte": found.bits_per_byte,
        "agreement": found.agreement,
        "steps": result.step,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / result.seconds,
        "minutes": result.seconds / 60,
        # Of batches, over the last tenth of the training; and of the held-out texts together.
        "max_violation": fmean(fmean(layers) for layers in late),
        "worst_violation": fmean(max(layers) for layers in late),
        "held_out_violation": fmean(found.balance.values()),
    }
    write(folder / "result.json", json.dumps(line) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.with_suffix(".new").write_text(text, encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)


def run_series(series: str, budget: dict[str, float], options: argparse.Namespace) -> list[Any]:
    """Run the arms that have no result yet, two at a time, and return all results."""

    def one(arm: str) -> Any:
        result = options.out / series / arm / "result.json"
        if not result.exists():
            given = [f"--{name}={getattr(options, name)}" for name in ("seed", "every")]
            given += [f"--out={options.out}", f"--documents={options.documents or 0}"]
            command = [sys.executable, __file__, f"--arm={arm}", f"--series={series}"]
            budgets = [f"--{name}={value}" for name, value in budget.items()]
            threads = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, *budgets, *given], check=True, env=threads)
        line = json.loads(result.read_text("utf-8"))
        print(told(line), flush=True)
        return line

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, ARMS))


def told(line: dict[str, Any]) -> str:
    """Return a row of the table."""
    prediction, balance = parts_of(line["arm"])
    agreement = "" if line["agreement"] is None else f"{line['agreement']:.1%}"
    return (
        f"| {line['series']} | {prediction} | {balance} | {line['bits_per_byte']:.4f} "
        f"| {line['steps']:,} | {line['tokens_per_second']:,.0f} | {line['max_violation']:.2f} "
        f"| {line['worst_violation']:.2f} | {line['held_out_violation']:.2f} | {agreement} |"
    )


HEAD = (
    "| equal | objective | balance | bits per byte | steps | tokens/s | MaxVio | its worst layer "
    "| held out | agreement |\n|---|---|---|---|---|---|---|---|---|---|"
)


def report(lines: Iterable[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the results, the table and the plots."""
    lines = list(lines)
    write(options.out / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    table = "\n".join([HEAD, *map(told, lines)])
    write(options.out / "results.md", table + "\n")
    print(table)
    try:
        for series in SERIES:
            folders = [options.out / series / arm for arm in ARMS]
            plot_png(
                folders,
                options.out / f"{series}.png",
                "minutes" if series == "minutes" else "steps",
            )
    except MissingDependencyError as error:
        print(f"no plots: {error}")
        return
    if options.docs is not None:
        images = options.docs / "images"
        images.mkdir(parents=True, exist_ok=True)
        for series in SERIES:
            shutil.copy(options.out / f"{series}.png", images / f"ablation-{series}.png")
        shutil.copy(options.out / "results.md", options.docs / "ablation-results.md")
        shutil.copy(options.out / "results.jsonl", options.docs / "ablation-results.jsonl")


def main() -> None:
    """Run all arms, or the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--minutes", type=float, default=25.0, help="of the processor, each arm")
    parser.add_argument("--steps", type=int, help="those of the slowest arm in its minutes if None")
    parser.add_argument("--every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("--documents", type=int, default=0, help="held out at the end; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docs", type=Path, help="a folder to copy table and plots to")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--series", choices=SERIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.documents = options.documents or None
    if options.arm is not None:
        budget = {options.series: getattr(options, options.series)}
        run_arm(options.arm, options.series, budget, options)
        return
    make_tokenizer(options.out / "tokenizer")
    # Encoded once, and not by two arms at the same time.
    config = settings(ARMS[0], "minutes", {"minutes": options.minutes}, options)
    build_data(config.data, build_tokenizer(config), tell=print)
    print(HEAD, flush=True)
    timed = run_series("minutes", {"minutes": options.minutes}, options)
    steps = options.steps or min(line["steps"] for line in timed)
    stepped = run_series("steps", {"steps": steps}, options)
    report([*timed, *stepped], options)


if __name__ == "__main__":
    main()
