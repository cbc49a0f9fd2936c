"""`pipeline("text-classification")`, beside Transformers' and alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.conftest import Made, Peers, close
from quintet import pipeline
from quintet.errors import ContextLengthError, InputError

TEXTS = ["Hello there, how are you today?", "def fibonacci(n):\n    return n", "The lazy dog. 🙂"]
PAIR = {"text": TEXTS[0], "text_pair": TEXTS[2]}
TASK, HEAD = "text-classification", "ForSequenceClassification"
FAMILIES = ("qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3", "zamba2")
THREE = {"id2label": {0: "bad", 1: "fair", 2: "good"}}


@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_those_of_transformers_in_every_family(family: str, peers: Peers) -> None:
    ours, theirs = peers(TASK, HEAD, family)
    assert close(ours(TEXTS), theirs(TEXTS))


@pytest.mark.parametrize("given", [TEXTS, TEXTS[0], PAIR, [PAIR, PAIR], TEXTS[:1]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": None},
        {"function_to_apply": "sigmoid"},
        {"function_to_apply": "none", "top_k": None},
        {"batch_size": 2},
    ],
    ids=str,
)
def test_every_option_gives_what_transformers_gives(
    given: Any, options: dict[str, Any], peers: Peers
) -> None:
    ours, theirs = peers(TASK, HEAD, **THREE)
    assert close(ours(given, **options), theirs(given, **options))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 1},
        {"num_labels": 1, "problem_type": "regression"},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ],
    ids=str,
)
def test_the_kind_of_problem_decides_the_function(changes: dict[str, Any], peers: Peers) -> None:
    ours, theirs = peers(TASK, HEAD, **changes)
    assert close(ours(TEXTS, top_k=None), theirs(TEXTS, top_k=None))


@pytest.mark.parametrize(
    ("count", "labels", "scores"),
    [
        pytest.param(1, torch.tensor([5.0]), lambda x: x, id="regression"),
        pytest.param(3, torch.tensor([[1.0, 0, 1]]), torch.sigmoid, id="several"),
        pytest.param(3, torch.tensor([2]), lambda x: torch.softmax(x, dim=-1), id="one"),
    ],
)
def test_what_a_head_was_trained_for_decides_the_function(
    count: int, labels: Tensor, scores: Callable[[Tensor], Tensor], headed: Made, tmp_path: Path
) -> None:
    untrained = pipeline(TASK, headed(HEAD, num_labels=count))
    model, tokenizer = untrained.model, untrained.tokenizer
    given = tokenizer(TEXTS[0], return_tensors="pt")
    model(**given, labels=labels).loss.backward()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = scores(model(**given).logits[0]).sort(descending=True).values
    made = pipeline(TASK, str(tmp_path))(TEXTS[0], top_k=None)
    assert [one["score"] for one in made] == pytest.approx(expected.tolist(), rel=1e-5)


def test_options_of_the_pipeline_hold_for_every_call(headed: Made) -> None:
    root = headed(HEAD, **THREE)
    made = pipeline("sentiment-analysis", root, top_k=2, batch_size=3)
    assert made(TEXTS) == pipeline(TASK, root)(TEXTS, top_k=2, batch_size=3)
    assert made.batch_size == 3
    assert len(made(TEXTS, top_k=1)[0]) == 1


def test_a_batch_needs_no_pad_token(headed: Made) -> None:
    made = pipeline(TASK, headed(HEAD, pad_token_id=None))
    assert made.model.config.pad_token_id is None
    assert close(made(TEXTS, batch_size=3), [made(text)[0] for text in TEXTS])


def test_a_long_text_is_refused_or_cut(headed: Made) -> None:
    made = pipeline(TASK, headed(HEAD))
    with pytest.raises(ContextLengthError, match=r"\d+ tokens.*context is 256.*truncation=True"):
        made(TEXTS[0] * 40)
    beginning = made.tokenizer.decode(made.tokenizer.encode(TEXTS[0])[:5])
    assert made(TEXTS[0], truncation=True, max_length=5) == made(beginning) != made(TEXTS[0])
    assert made(TEXTS[0] * 40, truncation=True)[0]["score"] > 0


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("", {}, "the text is empty"),
        ([], {}, "got an empty list"),
        (3, {}, "cannot take a int"),
        ([3], {}, "a int is no text"),
        ({"txt": "a"}, {}, "is no text"),
        ([TEXTS], {}, "a list is no text"),
        ("a", {"topk": 1}, "no option 'topk'; did you mean 'top_k'"),
        ("a", {"top_k": 0}, "top_k=0 has to be at least 1"),
        ("a", {"function_to_apply": "tanh"}, "function_to_apply='tanh'"),
        ("a", {"batch_size": 0}, "batch_size=0"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_named(
    given: Any, options: dict[str, Any], message: str, headed: Made
) -> None:
    made = pipeline(TASK, headed(HEAD))
    with pytest.raises(InputError, match=message):
        made(given, **options)
