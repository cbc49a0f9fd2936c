"""Tools that are not among the test tools: a test that needs one is skipped where it is missing."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.families import Family
from quintet import PreTrainedTokenizer
from tiny import trained_tokenizer

__all__ = ["VOCABULARY", "pair", "saved", "tokenizer", "tool"]

VOCABULARY = 384


def tool(name: str) -> Any:
    """Import a module of a tool, or skip the tests of a file: `make test-tools` installs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
            reason = f"{error.name} is not installed; make test-tools installs it"
            return pytest.skip(reason, allow_module_level=True)


def tokenizer() -> PreTrainedTokenizer:
    """A tokenizer of few ids with a chat template."""
    return trained_tokenizer()


def pair(family: Family, head: str = "ForCausalLM", **changes: Any) -> tuple[Any, Any]:
    """A model of ours and one of Transformers with the same weights, for that tokenizer."""
    torch.manual_seed(3)
    # There the balance loss of DeepSeek-V2 is ignored.
    alone = {"aux_loss_alpha": 0.0} if family.name == "deepseek-v2" else {}
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2}
    small = {**family.alone, **family.shallow, **alone, **sizes, **changes}
    return family.twins(head, small, "sdpa")


def saved(family: Family, path: Path) -> Path:
    """A folder with such a model and the tokenizer, which both libraries load."""
    ours, _ = pair(family)
    ours.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
