"""`pipeline("feature-extraction")`, beside Transformers' and alone."""

from typing import Any

import pytest
import torch

from pipelines.conftest import Made, Peers, close
from quintet import pipeline
from quintet.errors import ContextLengthError, InputError

TASK, HEAD = "feature-extraction", "Model"
TEXTS = ["Hello there, how are you today?", "a", "The lazy dog. 🙂"]


@pytest.mark.parametrize("family", ["qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3", "zamba2"])
def test_features_are_those_of_transformers(family: str, peers: Peers) -> None:
    ours, theirs = peers(TASK, HEAD, family)
    assert close(ours(TEXTS), theirs(TEXTS))
    assert close(ours(TEXTS[0]), theirs(TEXTS[0]))
    tensor = ours(TEXTS[0], return_tensors=True)
    torch.testing.assert_close(tensor, theirs(TEXTS[0], return_tensors=True), rtol=1e-4, atol=1e-4)


def test_a_batch_gives_what_texts_alone_give(headed: Made) -> None:
    made = pipeline(TASK, headed(HEAD), return_tensors=True)
    for together, text in zip(made(TEXTS, batch_size=3), TEXTS, strict=True):
        assert together.shape == (1, len(made.tokenizer.encode(text)), 64)
        torch.testing.assert_close(together, made(text), rtol=1e-5, atol=1e-5)


def test_a_text_can_be_cut(headed: Made) -> None:
    made = pipeline(TASK, headed(HEAD))
    beginning = made.tokenizer.decode(made.tokenizer.encode(TEXTS[0])[:5])
    cut = made(TEXTS[0], tokenize_kwargs={"truncation": True, "max_length": 5})
    assert close(cut, made(beginning))
    assert len(made("Hello" * 300, truncation=True)[0]) == 256
    with pytest.raises(ContextLengthError, match="context is 256"):
        made("Hello" * 300)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("", {}, "the text is empty"),
        ([["a"]], {}, "a list is no text"),
        ("a", {"truncation": True, "tokenize_kwargs": {"truncation": True}}, "given twice"),
        ("a", {"return_tensor": True}, "did you mean 'return_tensors'"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_named(
    given: Any, options: dict[str, Any], message: str, headed: Made
) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(TASK, headed(HEAD))(given, **options)
