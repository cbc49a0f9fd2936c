"""What a format costs: the perplexity of a fixed text, and how often the likeliest token stays.

    python -m benchmarks.perplexity smollm2 [FORMAT ...]

A format is float32, bfloat16, as-is (what the file has) or one of `quantize=`.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch

from quintet import AutoModelForCausalLM, AutoTokenizer

FORMATS = ("float32", "bfloat16", "as-is", "int8", "int4", "nf4")
TEXT = Path(__file__).with_name("prose.txt")


def load(name: str, form: str) -> Any:
    """Load a model in a format."""
    if form == "as-is":
        return AutoModelForCausalLM.from_pretrained(name)
    if form in ("float32", "bfloat16"):
        return AutoModelForCausalLM.from_pretrained(name, quantize="none", dtype=form)
    return AutoModelForCausalLM.from_pretrained(name, quantize=form)


def main(name: str, *forms: str) -> None:
    """Print a row for each format."""
    text = TEXT.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt")["input_ids"]
    reference = None
    print(f"{ids.shape[1]} tokens; argmax: how many have the likeliest token of the first row")
    print("format         MB  perplexity  argmax")
    for form in forms or FORMATS:
        model = load(name, form)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
        likeliest = logits.argmax(-1)
        reference = likeliest if reference is None else reference
        same = (likeliest == reference).float().mean().item()
        size = model.get_memory_footprint() / 1e6
        print(f"{form:10} {size:6.1f} {math.exp(loss):11.3f}   {same:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
