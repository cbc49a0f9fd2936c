"""Small checkpoints, in folders named as the pages name theirs."""

from pathlib import Path
from typing import Any

import pytest

from conformance.families import FAMILIES
from tiny import END, trained_tokenizer

# What is loaded by which name: a family, and the head that the checkpoint was saved with.
CHECKPOINTS = {
    "meta-deepseek_v2/DeepseekV2-2-7b-hf": ("deepseek-v2", "ForCausalLM"),
    "deepseek-ai/DeepSeek-V2-Lite": ("deepseek-v2", "ForSequenceClassification"),
    "deepseek-r1": ("deepseek-v3", "ForCausalLM"),
    "meta-deepseek_v3/DeepseekV3-2-7b-hf": ("deepseek-v3", "ForCausalLM"),
    "Zyphra/Zamba2-7B": ("zamba2", "ForCausalLM"),
    "Zyphra/Zamba2-7B-v1": ("zamba2", "ForCausalLM"),
    "Zyphra/Zamba2-2.7B": ("zamba2", "ForSequenceClassification"),
    "Qwen/Qwen2-7B-Instruct": ("qwen2", "ForCausalLM"),
    "converted": ("qwen2", "ForCausalLM"),
    "Qwen/Qwen1.5-MoE-A2.7B": ("qwen2-moe", "ForCausalLM"),
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": ("qwen2-moe", "ForCausalLM"),
    "mistralai/Qwen2Moe-8x7B-v0.1": ("qwen2-moe", "ForCausalLM"),
}
# What is asked for with max_length=30 has to leave room for an answer.
PROMPTS = ("Hey, are you conscious? Can you talk to me?",)


def checkpoint(root: Path, family: str, head: str, **changes: Any) -> None:
    """Write a small model of a family, with its tokenizer."""
    tokenizer = trained_tokenizer(*PROMPTS)
    (known,) = (f for f in FAMILIES if f.name == family)
    model: Any = known.model_of(
        head,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which each name of the pages is a small checkpoint."""
    root = tmp_path_factory.mktemp("hub")
    made: dict[tuple[str, str], Path] = {}
    for name, kind in CHECKPOINTS.items():
        place = root / name
        place.parent.mkdir(exist_ok=True)
        if kind in made:
            place.symlink_to(made[kind])
        else:
            checkpoint(place, *kind)
            made[kind] = place
    return root


@pytest.fixture
def at_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the folder in which the code runs: a directory goes before a hub id."""
    monkeypatch.chdir(hub)
    return hub
