"""Decode steps whose layers run in one call, beside the same layers called one by one.

    python benchmarks/one_call.py MODEL [--quantize int8] [--context 512 4096] [--batch 1]

In turns, 40 steps each, all threads torch has. Layers are called where somebody hooked them.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from quintet import AutoModelForCausalLM
from quintet.cache import Cache
from quintet.measurement.machine import read_bandwidth
from quintet.measurement.synthetic import filled_cache, random_ids
from quintet.modeling.heads import CausalLMHead

STEPS = 40


def step(model: CausalLMHead, token: Tensor, cache: Cache) -> float:
    """Return the seconds a step takes, as within `generate()`."""
    with model.fused_session(cache):
        start = time.perf_counter()
        model(token, past_key_values=cache, use_cache=True)
        return time.perf_counter() - start


def one_by_one(model: CausalLMHead, token: Tensor, cache: Cache) -> float:
    """Return the seconds a step takes that calls each layer."""
    layers: nn.ModuleList = model.base_model.layers
    hooks = [layer.register_forward_hook(lambda *_: None) for layer in layers]
    try:
        return step(model, token, cache)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def main() -> None:
    """Print a row for each context."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a directory with a checkpoint")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--context", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--batch", type=int, default=1)
    asked = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(asked.model, quantize=asked.quantize)
    print("| context | layers | one call | of pairs | bus GB/s |\n|---|---|---|---|---|")
    for context in asked.context:
        cache = filled_cache(model, asked.batch, context)
        token = random_ids(model.config.vocab_size, asked.batch, 1)
        called, whole = [], []
        for _ in range(STEPS + 2):
            called.append(one_by_one(model, token, cache))
            whole.append(step(model, token, cache))
        pairs = statistics.median(b / a for a, b in zip(called[2:], whole[2:], strict=True))
        milliseconds = [f"{1e3 * statistics.median(x[2:]):.2f}" for x in (called, whole)]
        bus = read_bandwidth().bytes_per_second / 1e9
        print(f"| {context} | {' | '.join(milliseconds)} | {pairs:.3f} | {bus:.0f} |", flush=True)


if __name__ == "__main__":
    main()
