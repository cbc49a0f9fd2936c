"""A small byte-level tokenizer, trained here, as ours and as the oracle's."""

import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from quintet.tokenization import Qwen2Tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXT = """The quick brown fox jumps over the lazy dog. It's what we're all here for, isn't it?
def main(argv: list[str]) -> int:\n    return 0 if argv else 42\n
Ünïcödé text: naïve café, schön, 你好,世界。Привет, мир! 🙂🙃 1234567890
system user assistant You are a helpful assistant. <tools> </tools> function name arguments
"""
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml() -> str:
    return CHATML


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with vocab.json, merges.txt and tokenizer.json of Qwen2's kind."""
    root = tmp_path_factory.mktemp("trained")
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend = Tokenizer(BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 2, trainer)
    backend.model.save(str(root))
    backend.add_special_tokens(["<|endoftext|>", *CHAT_TOKENS])
    backend.save(str(root / "tokenizer.json"))
    return root


@pytest.fixture
def tokenizer(trained: Path, chatml: str) -> Qwen2Tokenizer:
    return Qwen2Tokenizer(
        trained / "vocab.json",
        trained / "merges.txt",
        additional_special_tokens=CHAT_TOKENS,
        chat_template=chatml,
    )


@pytest.fixture(scope="session")
def oracle(trained: Path, chatml: str) -> Any:
    from transformers import Qwen2TokenizerFast

    return Qwen2TokenizerFast(
        vocab=str(trained / "vocab.json"),
        merges=str(trained / "merges.txt"),
        additional_special_tokens=CHAT_TOKENS,
        extra_special_tokens=CHAT_TOKENS,
        chat_template=chatml,
    )
