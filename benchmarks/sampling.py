"""What choosing a token costs beside the model, at a large vocabulary.

    python benchmarks/sampling.py quintet
    python benchmarks/sampling.py transformers

A Qwen2 of one small layer with the vocabulary of the released ones, one thread, batch 1.
"""

import importlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

VOCABULARY, NEW, ROUNDS = 151_936, 24, 4
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top_k=50": {"do_sample": True},
    "Qwen2's own": {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
    },
    "min_p=0.05": {"do_sample": True, "min_p": 0.05},
    "top_k=0": {"do_sample": True, "top_k": 0},
    "top_k=0, top_p=0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "4 beams": {"num_beams": 4},
}


def fastest(work: Callable[[], Any], rounds: int) -> float:
    """Return the best time in milliseconds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def main(package: str) -> None:
    """Print milliseconds a token for each way to choose."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    library = importlib.import_module(package)
    config = library.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = library.Qwen2ForCausalLM(config).eval()
    ids = torch.randint(1, VOCABULARY, (1, 32))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        alone = fastest(lambda: model(ids[:, :1], past_key_values=cache, logits_to_keep=1), 30)
    print(f"{package:14}{'forward alone':24}{alone:8.2f} ms")
    for name, options in CASES.items():
        options = {"do_sample": False, "max_new_tokens": NEW, **options}
        spent = fastest(lambda o=options: model.generate(ids, attention_mask=mask, **o), ROUNDS)
        print(f"{package:14}{name:24}{spent / NEW:8.2f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
