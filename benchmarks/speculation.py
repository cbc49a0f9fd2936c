"""What drafting gives: tokens a second of the packaged model, with and without, in turns.

    python benchmarks/speculation.py [--assistant MODEL] [--out FILE]

Prompts come from files that the model was not trained on. Every way continues a prompt before the
next prompt's turn, on one thread, and what is compared are times of the same prompt. Greedy is
`do_sample=False`, sampled what the model's own generation_config says.
"""

import argparse
import platform
import statistics
import sys
import sysconfig
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, demo_model

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_stdlib import collect

MODES: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampled": {}}


@dataclass
class Runs:
    """What was measured of one way to decode: seconds of each prompt, and what was accepted."""

    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    drafted: int = 0
    accepted: int = 0
    forwards: int = 0
    tokens: int = 0
    same: list[bool] = field(default_factory=list)

    def row(self, name: str, plain: "Runs", new: int) -> str:
        """Return a line of the table."""
        mine, other = (
            {i: statistics.median(times) for i, times in runs.seconds.items()}
            for runs in (self, plain)
        )
        speed = new * len(mine) / sum(mine.values())
        gains = [other[i] / mine[i] for i in mine]
        share = f"{self.accepted / self.drafted:.0%}" if self.drafted else ""
        each = f"{self.tokens / self.forwards:.2f}"
        gained = f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
        same = f"{sum(self.same)} of {len(self.same)}" if self.same else ""
        return f"| {name} | {speed:.0f} | {gained} | {share} | {each} | {same} |"


def ways(model: Any, assistant: Any) -> dict[str, dict[str, Any]]:
    """Return the options of each way to decode."""
    found: dict[str, dict[str, Any]] = {"one by one": {}}
    if model.config.to_dict().get("num_nextn_predict_layers"):
        for k in (1, 2, 3):
            found[f"use_mtp, {k} drafted"] = {"use_mtp": True, "num_assistant_tokens": k}
    found["prompt lookup, 3 drafted"] = {"prompt_lookup_num_tokens": 3}
    if assistant is not None:
        found["assistant, 3 drafted"] = {"assistant_model": assistant, "num_assistant_tokens": 3}
    return found


def prompts(tokenizer: Any, count: int, length: int) -> list[torch.Tensor]:
    """Return the ids (1, length) in the middle of so many held-out files."""
    texts = collect(Path(sysconfig.get_paths()["stdlib"])).held_out
    ids = (tokenizer(text, return_tensors="pt")["input_ids"] for text in texts)
    middles = (x[:, x.shape[1] // 3 :][:, :length] for x in ids)
    return [x for x in middles if x.shape[1] == length][:count]


def main() -> None:
    """Print a table for each mode, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(demo_model()))
    parser.add_argument("--assistant", help="a model of the same tokens")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    assistant = given.assistant and AutoModelForCausalLM.from_pretrained(given.assistant)
    asked = prompts(tokenizer, given.prompts, given.length)
    fixed = {"max_new_tokens": given.new, "eos_token_id": [], "return_dict_in_generate": True}

    lines = [
        f"{model.config.model_type}, {model.num_parameters():,} parameters, {model.dtype}; "
        f"{len(asked)} prompts of {given.length} tokens, {given.new} new ones, {given.rounds} "
        f"rounds, one thread of {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}.",
    ]
    for mode in given.modes:
        found = {name: Runs() for name in ways(model, assistant)}
        for turn in range(given.rounds + 1):
            for index, ids in enumerate(asked if turn else asked[:2]):
                plain = None
                for name, options in ways(model, assistant).items():
                    torch.manual_seed(index)
                    started = time.perf_counter()
                    out = model.generate(ids, **fixed, **MODES[mode], **options)
                    seconds = time.perf_counter() - started
                    plain = out.sequences if plain is None else plain
                    if turn:
                        runs = found[name]
                        runs.seconds[index].append(seconds)
                        told = out.speculation
                        runs.tokens += given.new
                        runs.forwards += given.new if told is None else 1 + len(told.accepted)
                        if told is not None:
                            runs.drafted += told.drafted_tokens
                            runs.accepted += told.accepted_tokens
                        if mode == "greedy" and turn == 1 and told is not None:
                            runs.same.append(torch.equal(out.sequences, plain))
        lines += [
            "",
            f"{mode.capitalize()}:",
            "",
            "| | tokens/s | times as fast, median of the prompts | accepted | tokens a forward "
            "| the same text |",
            "|---|---|---|---|---|---|",
            *(runs.row(name, found["one by one"], given.new) for name, runs in found.items()),
        ]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
