"""What fewer bits cost: bits a byte on held-out text, and how far the logits move.

python benchmarks/quantised_accuracy.py [MODEL] [--files N]
"""

import argparse
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, demo_model
from quintet.hub import locate
from quintet.training.scoring import score, text_document

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_stdlib import collect

WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "fp8": {"quantize": "fp8"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "nf4": {"quantize": "nf4"},
    "nf4, scales in 8 bits": {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    },
    "fp4": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(demo_model()))
    parser.add_argument("--files", type=int, default=12)
    given = parser.parse_args()
    root = locate(given.model, ("config.json", "model.safetensors", "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(root)
    texts = collect(Path(sysconfig.get_paths()["stdlib"])).held_out[: given.files]
    size = sum(len(text.encode()) for text in texts)
    documents = [text_document(tokenizer, text) for text in texts]
    ids = documents[0].input_ids[None, 1:401]
    truth = None
    print(f"{len(texts)} files, {size:,} bytes")
    print(f"{'':24}{'MB':>7}{'bits/byte':>11}{'logit error':>13}{'same choice':>13}")
    for name, options in WAYS.items():
        model = AutoModelForCausalLM.from_pretrained(root, **options)
        held = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
        bits = score(model, documents).bits_per_byte
        with torch.no_grad():
            logits = model(ids).logits.float()
        truth = logits if truth is None else truth
        error = float((logits - truth).norm() / truth.norm())
        same = float((logits.argmax(-1) == truth.argmax(-1)).float().mean())
        print(f"{name:24}{held / 1e6:7.2f}{bits:11.4f}{error:12.2%}{same:12.1%}", flush=True)


if __name__ == "__main__":
    main()
