"""`--adapter`, and what `quintet info` says of an adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet import AutoModelForCausalLM, LoraConfig

Run = Callable[..., Any]
OPTIONS = ("--no-echo", "-n", "8", "-t", "0", "-q")


@pytest.fixture(scope="module")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of the small chat model, which say something else."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        model = AutoModelForCausalLM.from_pretrained(chat_model)
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4,
            lora_alpha=64,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model.add_adapter(config)
        model.save_pretrained(root / name)
    return root / "a", root / "b"


def test_a_text_is_continued_with_adapters(
    quintet: Run, chat_model: Path, adapters: tuple[Path, Path]
) -> None:
    a, b = adapters

    def written(*more: object) -> str:
        result = quintet("generate", "Hello there", *OPTIONS, *more)
        assert (result.code, result.err) == (0, "")
        return str(result.out)

    plain = written("-m", chat_model)
    with_a = written("-m", chat_model, "--adapter", a)
    with_b = written("-m", chat_model, "--adapter", f"second={b}")
    both = written("-m", chat_model, "--adapter", a, "--adapter", b)
    assert len({plain, with_a, with_b, both}) == 4
    # A folder of an adapter names its model.
    assert written("-m", a) == with_a
    assert written("-m", a, "--adapter", b) == both


def test_an_adapter_that_is_none_is_named(quintet: Run, chat_model: Path) -> None:
    result = quintet("generate", "x", "-m", chat_model, "--adapter", chat_model)
    assert result.code == 4
    assert "no adapter_config.json" in result.err
    assert result.is_one_screen


def test_info_says_what_an_adapter_is(
    quintet: Run, chat_model: Path, adapters: tuple[Path, Path]
) -> None:
    result = quintet("info", adapters[0], "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == {
        "adapter": str(adapters[0]),
        "kind": {"kind": "LORA", "options": []},
        "of_model": str(chat_model),
        "task": "CAUSAL_LM",
        "rank": [4],
        "alpha": 64,
        "changes": ["down_proj", "q_proj"],
        "has_whole": [],
        "parameters": 2 * 4 * (32 + 32 + 48 + 32),
        "weights": 2 * 4 * (32 + 32 + 48 + 32) * 4,
    }
    table = quintet("info", adapters[0]).out
    assert "changes     down_proj, q_proj" in table
