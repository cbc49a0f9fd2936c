"""How a model in GGUF is meant to be used: its ends, and what Ollama says beside it."""

from array import array
from pathlib import Path
from typing import Any

import pytest

from quintet.generation.config import GenerationConfig
from quintet.generation.gguf import gguf_options
from quintet.sources import FoundModel

METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "<|end|>", "<|im_end|>", "<|user|>"],
    "tokenizer.ggml.token_type": array("i", [1, 3, 3, 3]),
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 2,
}


def read(parameters: dict[str, Any] | None = None, **more: Any) -> GenerationConfig:
    found = FoundModel(Path("m.gguf"), parameters=parameters or {})
    metadata = {**METADATA, **{f"general.sampling.{name}": value for name, value in more.items()}}
    return GenerationConfig(**gguf_options(metadata, found))


def test_all_tokens_that_end_an_answer_end_it() -> None:
    config = read()
    assert config.eos_token_id == [1, 2]
    assert config.pad_token_id == 2
    assert config.bos_token_id is None
    assert not config.do_sample


def test_how_tokens_are_drawn_is_the_files_and_before_it_ollamas() -> None:
    config = read(temp=0.5, top_k=30, penalty_repeat=1.1)
    assert (config.do_sample, config.temperature, config.top_k) == (True, 0.5, 30)
    assert config.repetition_penalty == 1.1
    config = read({"temperature": 0.9, "num_predict": 50}, temp=0.5, top_p=0.8)
    assert (config.temperature, config.top_p, config.max_new_tokens) == (0.9, 0.8, 50)
    config = read({"temperature": 0, "num_predict": -1})
    assert (config.do_sample, config.temperature, config.max_new_tokens) == (False, None, None)


def test_what_has_no_effect_is_told() -> None:
    with pytest.warns(UserWarning, match=r"num_ctx=4096, stop=\['User:'\].*stop_strings"):
        config = read({"stop": ["<|user|>", "User:"], "num_ctx": 4096})
    assert config.eos_token_id == [1, 2, 3]
    with pytest.warns(UserWarning, match=r"top_p=7.*left out"):
        assert read({"top_p": 7}).top_p is None


def test_a_file_without_a_tokenizer_says_nothing_of_ends() -> None:
    options = gguf_options({"tokenizer.ggml.model": "no_vocab"}, FoundModel(Path("m.gguf")))
    assert options == {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
