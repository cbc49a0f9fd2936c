"""Loading, steps and prompts of one model in each format of weights, in turns.

    python benchmarks/formats.py [--geometry qwen2-0.5b] [--rounds 6]

Weights are random; contexts have 512 tokens; medians of the rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from quintet import AutoModelForCausalLM, Int4Config
from quintet.measurement.geometries import geometry
from quintet.measurement.synthetic import random_ids, random_model

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int4 by 64": {"quantization_config": Int4Config(group_size=64)},
}
CONTEXT, WARM, STEPS = 512, 3, 12


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of a step and of a prompt."""
    cache = model.new_cache()
    started = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    prompt = time.perf_counter() - started
    for _ in range(WARM):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    started = time.perf_counter()
    for _ in range(STEPS):
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    return (time.perf_counter() - started) / STEPS, prompt


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="qwen2-0.5b")
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    config = geometry(given.geometry).config()
    models, loads = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        random_model(config, torch.bfloat16).save_pretrained(Path(folder) / "model")
        for name, options in FORMATS.items():
            started = time.perf_counter()
            models[name] = AutoModelForCausalLM.from_pretrained(
                Path(folder) / "model", **options
            ).eval()
            loads[name] = time.perf_counter() - started
        ids = random_ids(config.vocab_size, 1, CONTEXT)
        seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(given.rounds):
            for name, model in models.items():
                seen[name].append(measure(model, ids))
    print("| | load s | step ms | prompt s |\n|---|---|---|---|")
    for name, pairs in seen.items():
        step, prompt = (statistics.median(one) for one in zip(*pairs, strict=True))
        print(f"| {name} | {loads[name]:.1f} | {1e3 * step:.1f} | {prompt:.2f} |")


if __name__ == "__main__":
    main()
