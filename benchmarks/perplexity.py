"""What a format costs: the perplexity of two fixed texts, and how often the likeliest token stays.

    python -m benchmarks.perplexity smollm2 [FORMAT ...]

A format is float32, bfloat16, as-is (what the file has), int4-64 (int4 of groups of 64, without
offsets) or one of `quantize=`.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, Int4Config
from quintet.training.scoring import predictions

FORMATS = ("float32", "bfloat16", "as-is", "int8", "int4", "int4-64", "nf4")
TEXTS = ("prose.txt", "harbour.txt")


def load(name: str, form: str) -> Any:
    """Load a model in a format."""
    if form == "as-is":
        return AutoModelForCausalLM.from_pretrained(name)
    if form == "int4-64":
        wish = Int4Config(group_size=64)
        return AutoModelForCausalLM.from_pretrained(name, quantization_config=wish)
    if form in ("float32", "bfloat16"):
        return AutoModelForCausalLM.from_pretrained(name, quantize="none", dtype=form)
    return AutoModelForCausalLM.from_pretrained(name, quantize=form)


def main(name: str, *forms: str) -> None:
    """Print a row for each format."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = [Path(__file__).with_name(text).read_text(encoding="utf-8") for text in TEXTS]
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    count = sum(ids.shape[1] for ids in rows)
    reference = None
    print(f"{count} tokens; argmax: how many have the likeliest token of the first row")
    print("format         MB    bits " + "".join(f"{text:>12}" for text in TEXTS) + "   argmax")
    for form in forms or FORMATS:
        model = load(name, form)
        losses, likeliest = [], []
        for ids in rows:
            pieces = list(predictions(model, ids[0], model.config.max_position_embeddings))
            losses.append(torch.cat([piece.bits() for piece in pieces]).mean().item())
            likeliest += [piece.logits.argmax(-1) for piece in pieces]
        found = torch.cat(likeliest)
        reference = found if reference is None else reference
        same = (found == reference).float().mean().item()
        held = model.get_memory_footprint()
        bits = 8 * held / model.num_parameters()
        costs = "".join(f"{2**loss:12.3f}" for loss in losses)
        print(f"{form:10} {held / 1e6:6.1f}  {bits:6.3f} {costs}   {same:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
