"""Prompts of unequal lengths in one batch, beside one prompt of their sum and beside each alone.

    python benchmarks/padding.py [GEOMETRY ...] [--rounds 3] [--shorter 1]

Eight prompts of 64 to 1,024 tokens, padded on the left, random weights in bfloat16, in turns.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from quintet.measurement.geometries import geometry
from quintet.measurement.synthetic import random_ids, random_model
from quintet.modeling.heads import CausalLMHead

NAMES = (
    "qwen2-0.5b",
    "deepseek-v2-lite-6l",
    "deepseek-v3-2l-64e",
    "qwen1.5-moe-a2.7b-6l",
    "zamba2-1.2b",
)
LENGTHS = (64, 96, 144, 224, 336, 512, 768, 1024)


def seconds(model: CausalLMHead, *batches: tuple[Tensor, Tensor]) -> float:
    """Return how long it takes to read some batches, of ids and masks."""
    start = time.perf_counter()
    for ids, mask in batches:
        model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """Print a row for each geometry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("geometry", nargs="*", default=NAMES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shorter", type=int, default=1, help="divide all lengths by")
    asked = parser.parse_args()
    lengths = [n // asked.shorter for n in LENGTHS]
    print(f"prompts of {lengths} tokens, {torch.get_num_threads()} threads\n")
    print("| | batch s | one of the sum s | each alone s | of the sum | of those alone |")
    print("|---|---|---|---|---|---|")
    for name in asked.geometry:
        model = random_model(geometry(name).config(), torch.bfloat16)
        ids = random_ids(model.config.vocab_size, len(lengths), max(lengths))
        mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
        joined = ids[mask.bool()][None]
        alone = [row[-n:][None] for row, n in zip(ids, lengths, strict=True)]
        batches = [
            [(ids, mask)],
            [(joined, torch.ones_like(joined))],
            [(one, torch.ones_like(one)) for one in alone],
        ]
        times: list[list[float]] = [[], [], []]
        for _ in range(asked.rounds + 1):
            for spent, batch in zip(times, batches, strict=True):
                spent.append(seconds(model, *batch))
        ours, whole, each = (spent[1:] for spent in times)
        cells = [f"{statistics.median(x):.2f}" for x in (ours, whole, each)]
        for other in (whole, each):
            pairs = [a / b for a, b in zip(ours, other, strict=True)]
            cells.append(f"{statistics.median(pairs):.3f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
