"""A checkpoint with random weights that servers can serve: with a tokenizer for all of its ids."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE

from benchmarks.files import checkpoint
from quintet import AutoTokenizer
from quintet.measurement.serving.workload import WORDS

__all__ = ["servable", "write_tokenizer"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def servable(folder: Path, geometry: str) -> Path:
    """Return the directory of a geometry's checkpoint with a tokenizer, writing what is not there.

    Each word that workloads are made of is a token with the space before it, and every id of the
    model has a text of its own, so that whatever random weights write can be sent, piece by piece.
    """
    path = checkpoint(folder, geometry)
    if not (path / "tokenizer.json").is_file():
        write_tokenizer(path, json.loads((path / "config.json").read_text())["vocab_size"])
    return path


def write_tokenizer(path: Path, size: int) -> None:
    """Write a tokenizer of Qwen2's kind, which llama.cpp knows how to split texts for."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    dice = random.Random(0)
    lines = ["".join(f" {word}" for word in dice.sample(WORDS, len(WORDS))) for _ in range(50)]
    trained.train_from_iterator(lines, trainer)
    learnt = json.loads(trained.to_str())["model"]
    vocabulary: dict[str, int] = learnt["vocab"]
    # No text is ever split into these.
    for number in range(len(vocabulary), size - len(SPECIAL)):
        vocabulary[f"Ġw{number}"] = number
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("\n".join(" ".join(one) for one in learnt["merges"]))
    special = {
        str(len(vocabulary) + at): {"content": text, "special": True, "normalized": False}
        for at, text in enumerate(SPECIAL)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": special,
        "eos_token": SPECIAL[-1],
        "pad_token": SPECIAL[0],
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(path).save_pretrained(path)
