"""What four bits cost with a text in view and without it, on other texts.

    python -m benchmarks.calibration [MODEL] [--view FILE ...] [--measure FILE ...]

Without arguments: the packaged model, and modules of Python's standard library. "divergence" is of
the distributions from those of the model in plain numbers, in nats a token.
"""

import argparse
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quintet import AutoModelForCausalLM, AutoTokenizer, Int4Config, demo_model
from quintet.conversion import convert
from quintet.hub import locate_weights

VIEW = ("argparse.py", "json/decoder.py", "http/client.py", "heapq.py", "ast.py")
MEASURE = ("shelve.py", "queue.py", "textwrap.py", "csv.py", "bisect.py", "uuid.py")
# Tokens in view, measured, and at a time.
MOST, MEASURED, WINDOW = 16384, 8192, 256
FORMS = {"int4": Int4Config(), "int4 by 64": Int4Config(group_size=64)}


def windows(tokenizer: Any, files: Sequence[Path], most: int) -> list[Tensor]:
    """Return windows (1, T) of as many tokens of all files, the same share of each."""
    share = most // len(files)
    texts = [file.read_text(encoding="utf-8")[: 16 * share] for file in files]
    ids = [tokenizer(text, verbose=False)["input_ids"][:share] for text in texts]
    whole = torch.tensor([[token for one in ids for token in one]])
    return [one for one in whole.split(WINDOW, dim=1) if one.shape[1] > 1]


@torch.no_grad()
def predicted(folder: str | Path, texts: Sequence[Tensor]) -> list[Tensor]:
    """Return the log-probabilities (T, V) of what follows each token of each window."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantize="none", dtype="float32")
    return [model(ids, use_cache=False).logits[0].log_softmax(-1) for ids in texts]


def loss_of(found: Sequence[Tensor], texts: Sequence[Tensor]) -> float:
    """Return the mean nats of a token."""
    pairs = zip(found, texts, strict=True)
    nats = [-x[:-1].gather(1, ids[0, 1:, None]) for x, ids in pairs]
    return torch.cat(nats).mean().item()


def divergence(right: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the mean divergence of distributions from the right ones."""
    pairs = zip(right, found, strict=True)
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean().item()


def main() -> None:
    """Print a row for each form, with a text in view and without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(demo_model()))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name, files in (("view", VIEW), ("measure", MEASURE)):
        parser.add_argument(
            f"--{name}", nargs="+", type=Path, default=[stdlib / file for file in files]
        )
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    view = windows(tokenizer, options.view, MOST)
    texts = windows(tokenizer, options.measure, MEASURED)
    source = locate_weights(options.model)
    right = predicted(source, texts)
    plain = loss_of(right, texts)
    print(f"{sum(ids.shape[1] for ids in texts):,} tokens, {plain:.4f} nats in plain numbers")
    print("form         text in view   nats more   divergence   seconds")
    for form, config in FORMS.items():
        for batches in ([], view):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                convert(source, folder, quantization_config=config, calibrate=batches)
                took = time.perf_counter() - began
                found = predicted(folder, texts)
            more, apart = loss_of(found, texts) - plain, divergence(right, found)
            has = "yes" if batches else "no"
            print(f"{form:12} {has:>12} {more:11.4f} {apart:12.4f} {took:9.1f}", flush=True)


if __name__ == "__main__":
    main()
