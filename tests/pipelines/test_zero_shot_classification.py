"""`pipeline("zero-shot-classification")`, beside Transformers' and alone."""

from typing import Any

import pytest

from pipelines.conftest import Made, Peers, close
from quintet import pipeline
from quintet.errors import InputError

TASK, HEAD = "zero-shot-classification", "ForSequenceClassification"
THREE = {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}
FIRST = {"id2label": {0: "ENTAILMENT", 1: "not_entailment"}}
TEXTS = ["Hello there, how are you today?", "The quick brown fox jumps."]
LABELS = ["animals", "greeting", "code"]


@pytest.mark.parametrize("changes", [THREE, FIRST], ids=["three", "entailment-first"])
@pytest.mark.parametrize("given", [TEXTS, TEXTS[0]], ids=["list", "text"])
@pytest.mark.parametrize(
    "options",
    [
        {"candidate_labels": LABELS},
        {"candidate_labels": "animals, greeting,code"},
        {"candidate_labels": LABELS, "multi_label": True},
        {"candidate_labels": "code"},
        {"candidate_labels": LABELS, "hypothesis_template": "It is about {}!"},
    ],
    ids=str,
)
def test_results_are_those_of_transformers(
    changes: dict[str, Any], given: Any, options: dict[str, Any], peers: Peers
) -> None:
    ours, theirs = peers(TASK, HEAD, **changes)
    expected = theirs(given, **options)
    assert close(ours(given, **options), expected)
    assert close(ours(given, **options, batch_size=4), expected)


def test_the_text_is_cut_and_the_hypothesis_is_not(peers: Peers) -> None:
    ours, theirs = peers(TASK, HEAD, **THREE, max_position_embeddings=24)
    theirs.tokenizer.model_max_length = 24
    text = TEXTS[0] * 5
    assert close(ours(text, LABELS), theirs(text, LABELS))


def test_without_a_label_of_entailment_it_is_the_last_one(peers: Peers) -> None:
    with pytest.warns(UserWarning, match=r"labels of this model are LABEL_0, .*the last one"):
        ours, theirs = peers(TASK, HEAD, num_labels=3)
    assert close(ours(TEXTS[0], LABELS), theirs(TEXTS[0], LABELS))
    assert close(
        ours(TEXTS[0], LABELS, multi_label=True), theirs(TEXTS[0], LABELS, multi_label=True)
    )


def test_a_model_of_one_label_is_refused(headed: Made) -> None:
    with pytest.raises(InputError, match="this model has 1 label"):
        pipeline(TASK, headed(HEAD, num_labels=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there are no labels"),
        ({"candidate_labels": " , "}, "there are no labels"),
        ({"candidate_labels": LABELS, "hypothesis_template": "no place"}, "no place for the label"),
        ({"candidate_label": LABELS}, "did you mean 'candidate_labels'"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_named(
    options: dict[str, Any], message: str, headed: Made
) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(TASK, headed(HEAD, **THREE))(TEXTS, **options)
