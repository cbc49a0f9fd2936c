"""Small models with each head, as a pipeline of ours and as one of Transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from conformance.families import FAMILIES
from quintet import pipeline
from tiny import END, trained_tokenizer

Made = Callable[..., Path]
Peers = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="session")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Write a small model of a family with a head, once."""
    made: dict[str, Path] = {}

    def build(head: str, family: str = "qwen2", **changes: Any) -> Path:
        key = repr((head, family, changes))
        if key not in made:
            tokenizer = trained_tokenizer()
            (known,) = (f for f in FAMILIES if f.name == family)
            ids = {
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 256,
                "eos_token_id": tokenizer.convert_tokens_to_ids(END),
                "pad_token_id": tokenizer.pad_token_id,
            }
            made[key] = tmp_path_factory.mktemp("headed")
            known.model_of(head, **{**ids, **changes}).save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return build


@pytest.fixture(scope="session")
def peers(headed: Made) -> Peers:
    """Return our pipeline and Transformers' over the same files."""

    def both(task: str, head: str, family: str = "qwen2", **changes: Any) -> tuple[Any, Any]:
        root = headed(head, family, **changes)
        # By itself it would read the files of a Qwen2 with rules of its own.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(root)
        theirs = transformers.pipeline(task, str(root), tokenizer=tokenizer, device="cpu")
        return pipeline(task, root), theirs

    return both


def close(ours: Any, theirs: Any) -> bool:
    """Tell whether results are the same, but for the rounding of their numbers."""
    if isinstance(theirs, dict):
        return set(ours) == set(theirs) and all(close(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    if isinstance(theirs, str | int):
        return bool(ours == theirs)
    return bool(ours == pytest.approx(float(theirs), rel=1e-4, abs=2e-5))
