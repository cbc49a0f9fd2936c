"""Two versions of this library beside each other: steps of decoding and prompts, in turns.

    python benchmarks/versions.py OLD NEW [--model qwen2-0.5b …] [--form bf16 int8 int4 sampled]

OLD and NEW are checkouts (`git worktree add`). Each runs in a process of its own, with random
weights in bfloat16 or what is made of them, and waits while the other one measures.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CONTEXT, NEW = 256, 24
MODELS = (
    "qwen2-0.5b",
    "qwen1.5-moe-a2.7b-6l",
    "deepseek-v2-lite-6l",
    "deepseek-v3-2l-64e",
    "zamba2-1.2b",
)

FORMS = ("bf16", "int8", "int4", "sampled")

WORKER = """
import sys, tempfile, time, torch
from quintet import AutoModelForCausalLM
try:
    from quintet.measurement.geometries import geometry
    from quintet.measurement.synthetic import random_ids, random_model
except ImportError:  # what it was called in older versions
    from quintet.benchmark.geometries import geometry
    from quintet.benchmark.synthetic import random_ids, random_model
name, form, context, new, threads = *sys.argv[1:3], *map(int, sys.argv[3:])
torch.set_num_threads(threads)
config = geometry(name).config()
model = random_model(config, torch.bfloat16).eval()
if form.startswith("int"):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, quantize=form)
ids = random_ids(config.vocab_size, 1, context)
chosen = {"do_sample": False}
if form == "sampled":
    chosen = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
def generate(tokens):
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, eos_token_id=[], **chosen)
    return time.perf_counter() - started
generate(new)
print("ready", flush=True)
for line in sys.stdin:
    prompt = generate(1)
    print(prompt, (generate(new) - prompt) / (new - 1), flush=True)
"""


def worker(checkout: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start a version, which answers each line with the seconds of a prompt and of a step."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        env={**os.environ, "PYTHONPATH": str(checkout / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def asker(process: "subprocess.Popen[str]") -> Callable[[], tuple[float, float]]:
    """Return what measures once."""
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    if stdout.readline() != "ready\n":
        raise SystemExit("a version did not start")

    def ask() -> tuple[float, float]:
        stdin.write("\n")
        stdin.flush()
        prompt, step = map(float, stdout.readline().split())
        return prompt, step

    return ask


def main() -> None:
    """Print a row for each model: medians, and of the pairs new over old."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS[:1])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    print("| model | form | prompt ms, old | new | of pairs | step ms, old | new | of pairs |")
    print("|---|---|---|---|---|---|---|---|")
    for model, form in itertools.product(asked.model, asked.form):
        arguments = (model, form, str(CONTEXT), str(NEW), str(asked.threads))
        pairs = []
        # Who starts first has the large pages: half of the rounds each.
        for later in (False, True):
            checkouts = [asked.new, asked.old] if later else [asked.old, asked.new]
            processes = [worker(checkout, *arguments) for checkout in checkouts]
            asks = [asker(process) for process in processes]
            for round_ in range(asked.rounds // 2):
                # Who goes first finds the memory as the other one left it.
                order = (0, 1) if round_ % 2 else (1, 0)
                found = {at: asks[at]() for at in order}
                pairs.append((found[int(later)], found[1 - int(later)]))
            for process in processes:
                process.kill()
        cells = []
        for kind in (0, 1):
            olds, news = ([pair[side][kind] for pair in pairs] for side in (0, 1))
            ratio = statistics.median(b / a for a, b in zip(olds, news, strict=True))
            cells += [f"{1e3 * statistics.median(x):.2f}" for x in (olds, news)] + [f"{ratio:.3f}"]
        print(f"| {model} | {form} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
