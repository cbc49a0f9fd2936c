"""What a grammar costs: to be compiled, at each token, and what drafts that it forces give back.

    python benchmarks/grammars.py masks TOKENIZER…   # directories or hub ids
    python benchmarks/grammars.py drafts MODEL       # time to fill a schema, drafts off and on

Masks are those along a text of 50 tokens, in a vocabulary padded to a multiple of 128 as released
embeddings are; what is told are the median and the 99th percentile of twenty times.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, grammar
from quintet.grammar import Constraint, Grammars

ADDRESS = {"street": {"type": "string"}, "city": {"type": "string"}}
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": ADDRESS,
            "required": [*ADDRESS],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
TEXT = (
    '{"name": "Ada Lovelace, of London", "age": 36, "tags": ["first", "of her kind"], "address": '
    '{"street": "St James Square 12", "city": "London"}}'
)
CONSTRAINTS: dict[str, Constraint] = {
    "schema": grammar.json_schema(PERSON),
    "any object": grammar.json_object(),
    "date": grammar.regex(r"\d{4}-\d{2}-\d{2}"),
    "10,000 values": grammar.json_schema({"enum": list(range(10_000))}),
}
PROMPT = "Ada Lovelace, 36, of St James Square 12 in London, is the first of her kind.\nAs JSON: "


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def told(times: list[float]) -> str:
    """Return the median and the 99th percentile in microseconds."""
    return f"{statistics.median(times) * 1e6:.0f} / {np.percentile(times, 99) * 1e6:.0f}"


def masks(names: list[str]) -> None:
    """Print a row a tokenizer."""
    print("| vocabulary | table s | " + " | ".join(f"{kind} ms" for kind in CONSTRAINTS), end="")
    print(" | mask µs | with its application µs | forced tokens µs |")
    for name in names:
        tokenizer = AutoTokenizer.from_pretrained(name)
        V = -(-len(tokenizer) // 128) * 128
        begin = time.perf_counter()
        grammars = Grammars(tokenizer, V)
        cells = [f"{V:,}", f"{time.perf_counter() - begin:.2f}"]
        for constraint in CONSTRAINTS.values():
            spent = seconds(lambda: grammars.compile(constraint))  # noqa: B023
            cells.append(f"{spent * 1e3:.1f}")
        ids = tokenizer.encode(TEXT, add_special_tokens=False)
        row, scores = torch.tensor([[1] * 500 + ids]), torch.randn(1, V)
        made, alone, whole, forced = grammars.compile(CONSTRAINTS["schema"]), [], [], []
        for _ in range(20):
            processor = made.copy()
            for end in range(500, row.shape[1]):
                text = row[:, :end]
                whole.append(seconds(lambda: processor(text, scores)))  # noqa: B023
                # Asked again, only the mask is made again.
                follower, words = processor.rows[0], processor.words[0]
                alone.append(seconds(lambda: follower.fill(text[0], words)))  # noqa: B023
                forced.append(seconds(lambda: processor.forced(0, text[0])))  # noqa: B023
        print(f"| {' | '.join([*cells, told(alone), told(whole), told(forced)])} |", flush=True)


def drafts(name: str) -> None:
    """Print how long a schema takes to be filled."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    grammars = Grammars(tokenizer, model.config.vocab_size)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ways: dict[str, dict[str, Any]] = {"none": {}, "lookup 4": {}, "lookup 8": {}}
    ways["lookup 4"]["prompt_lookup_num_tokens"] = 4
    ways["lookup 8"]["prompt_lookup_num_tokens"] = 8
    spent: dict[str, list[float]] = {way: [] for way in ways}
    lengths = set()
    for _ in range(7):
        for way, options in ways.items():
            processor = grammars.compile(CONSTRAINTS["schema"])
            begin = time.perf_counter()
            ids = model.generate(
                **inputs,
                logits_processor=[processor],
                do_sample=False,
                max_new_tokens=200,
                **options,
            )
            spent[way].append(time.perf_counter() - begin)
            lengths.add(ids.shape[1] - inputs["input_ids"].shape[1])
    print(
        f"{lengths} tokens; "
        + ", ".join(f"{w}: {statistics.median(t):.3f} s" for w, t in spent.items())
    )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("masks", "drafts"))
    parser.add_argument("names", nargs="+")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "masks":
        masks(asked.names)
    else:
        drafts(asked.names[0])


if __name__ == "__main__":
    main()
