"""`pipeline("token-classification")`, beside Transformers' and alone."""

import warnings
from typing import Any

import pytest
import torch

from pipelines.conftest import Made, Peers, close
from quintet import pipeline
from quintet.errors import InputError

TASK, HEAD = "token-classification", "ForTokenClassification"
LABELS = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}}
TEXTS = [
    "Hello there, how are you today? Naïve café.",
    "The quick brown fox jumps over the lazy dog.",
    "你好,世界。 🙂🙃 1234567890",
]
WORDS = ["Hello", "there,", "naïve", "🙂", "fox"]
EACH = pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])


@pytest.fixture(autouse=True)
def _as_it_is_there() -> Any:
    with warnings.catch_warnings():
        # Transformers tells that a byte-level tokenizer knows no words.
        warnings.filterwarnings("ignore", "Tokenizer does not support real words")
        yield


@EACH
@pytest.mark.parametrize("given", [TEXTS, TEXTS[0]], ids=["list", "text"])
def test_results_are_those_of_transformers(strategy: str, given: Any, peers: Peers) -> None:
    ours, theirs = peers(TASK, HEAD, **LABELS)
    for more in ({}, {"ignore_labels": []}, {"batch_size": 2}):
        options: dict[str, Any] = {"aggregation_strategy": strategy, **more}
        found, expected = ours(given, **options), theirs(given, **options)
        if strategy in ("first", "average", "max"):
            # There a word is decoded twice, and loses the letters that are not ASCII.
            found, expected = without_words(found), without_words(expected)
        assert close(found, expected)


def without_words(found: Any) -> Any:
    if isinstance(found, list):
        return [without_words(one) for one in found]
    return {key: value for key, value in found.items() if key != "word"}


@pytest.mark.parametrize("family", ["qwen2-moe", "deepseek-v3"])
def test_other_families(family: str, peers: Peers) -> None:
    ours, theirs = peers(TASK, HEAD, family, **LABELS)
    assert close(ours(TEXTS), theirs(TEXTS))


@pytest.mark.parametrize("family", ["deepseek-v2", "zamba2"])
def test_families_with_a_head_that_transformers_lacks(family: str, headed: Made) -> None:
    made = pipeline("ner", headed(HEAD, family, **LABELS), ignore_labels=[])
    (token, *_), _, _ = made(TEXTS, batch_size=3)
    ids = made.tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        scores = made.model(**ids).logits[0, 0].softmax(dim=-1)
    assert token["entity"] == LABELS["id2label"][int(scores.argmax())]
    assert token["score"] == pytest.approx(float(scores.max()), rel=1e-4)


@EACH
def test_offsets_point_into_the_text(strategy: str, headed: Made) -> None:
    made = pipeline(TASK, headed(HEAD, **LABELS), aggregation_strategy=strategy, ignore_labels=[])
    for text in TEXTS[:2]:
        found = made(text)
        assert found[0]["start"] == 0
        assert found[-1]["end"] == len(text)
        for one in found:
            word = one["word"]
            if strategy == "none":
                word = made.tokenizer.convert_tokens_to_string([word])
            # Half of a letter is a token, too.
            assert "�" in word or text[one["start"] : one["end"]].strip() == word.strip()


@pytest.mark.parametrize("delimiter", [" ", " | "])
def test_words_are_counted_in_the_text_they_make(delimiter: str, peers: Peers) -> None:
    ours, theirs = peers(TASK, HEAD, **LABELS)
    options = {"is_split_into_words": True, "delimiter": delimiter, "ignore_labels": []}
    (expected,) = theirs([WORDS], **options)
    assert close(ours(WORDS, **options), expected)
    assert close(ours([WORDS, WORDS], **options), [expected, expected])
    joined = delimiter.join(WORDS)
    assert {joined[one["start"] : one["end"]].strip() for one in expected} & set(WORDS)


@pytest.mark.parametrize("stride", [0, 4])
def test_a_long_text_is_read_in_windows(stride: int, peers: Peers) -> None:
    ours, theirs = peers(TASK, HEAD, **LABELS, max_position_embeddings=24)
    theirs.tokenizer.model_max_length = 24
    text = " ".join(TEXTS[:2] * 3)
    options = {"stride": stride, "aggregation_strategy": "simple", "ignore_labels": []}
    found = ours(text, **options)
    assert close(found, theirs(text, **options))
    assert close(ours(text, **options, batch_size=3), found)
    assert found[-1]["end"] == len(text)


def test_without_windows_it_is_cut_and_told(peers: Peers) -> None:
    ours, theirs = peers(TASK, HEAD, **LABELS, max_position_embeddings=24)
    theirs.tokenizer.model_max_length = 24
    text = " ".join(TEXTS[:2] * 3)
    with pytest.warns(UserWarning, match="longer than 24 tokens.*stride"):
        found = ours(text)
    assert close(found, theirs(text))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("", {}, "the text is empty"),
        (["a", 3], {}, "a int is no text"),
        ("a", {"is_split_into_words": True}, "is a list of words, not 'a'"),
        ("a", {"aggregation_strategy": "mean"}, "aggregation_strategy='mean'"),
        ("a", {"stride": 3}, "stride needs an aggregation_strategy"),
        ("a", {"stride": 256, "aggregation_strategy": "max"}, "stride=256.*of 256 tokens"),
        ("a", {"agregation_strategy": "max"}, "did you mean 'aggregation_strategy'"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_named(
    given: Any, options: dict[str, Any], message: str, headed: Made
) -> None:
    made = pipeline(TASK, headed(HEAD, **LABELS))
    with pytest.raises(InputError, match=message):
        made(given, **options)
