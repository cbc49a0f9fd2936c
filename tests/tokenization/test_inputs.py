"""What a call takes as text, and what it says of lengths, is what Transformers takes and says."""

import logging
import pickle
import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from quintet.tokenization import LongTextWarning, PreTrainedTokenizer

COLUMNS = {
    "return_offsets_mapping": True,
    "return_special_tokens_mask": True,
    "return_token_type_ids": True,
}
ROLES = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
same_fixture = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
words = st.lists(st.sampled_from("abcdefghij"), max_size=6)
texts = words.map(" ".join)


def surrounding() -> Tokenizer:
    """A pipeline that tells texts, pairs and their segments apart."""
    names = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", *"abcdefghij"]
    backend = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(names[:4])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    return backend


@pytest.fixture
def ours() -> PreTrainedTokenizer:
    return PreTrainedTokenizer(surrounding(), **ROLES)  # type: ignore[arg-type]


@pytest.fixture
def theirs() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=surrounding(), verbose=True, **ROLES)


def said_of_length(call: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call()
    return result, [str(one.message) for one in seen]


@same_fixture
@given(
    batch=st.lists(
        texts | st.tuples(texts, texts) | st.lists(texts, min_size=2, max_size=2),
        min_size=1,
        max_size=4,
    ),
    outer=st.sampled_from([list, tuple]),
    padding=st.booleans(),
    cut=st.sampled_from([None, 5, 9]),
)
def test_pairs_may_stand_in_the_place_of_texts(
    ours: PreTrainedTokenizer,
    theirs: Any,
    batch: list[Any],
    outer: Any,
    padding: bool,
    cut: int | None,
) -> None:
    options: dict[str, Any] = {"padding": padding, **COLUMNS}
    if cut:
        options |= {"truncation": True, "max_length": cut}
    mine, other = ours(outer(batch), **options), theirs(outer(batch), **options)
    assert mine.data == other.data
    assert [mine.sequence_ids(i) for i in range(len(batch))] == [
        other.sequence_ids(i) for i in range(len(batch))
    ]


@same_fixture
@given(
    batch=st.lists(
        words | st.tuples(words, words) | st.lists(words, min_size=2, max_size=2),
        min_size=1,
        max_size=4,
    )
)
def test_pairs_of_words_may_stand_in_the_place_of_words(
    ours: PreTrainedTokenizer, theirs: Any, batch: list[Any]
) -> None:
    options: dict[str, Any] = {"is_split_into_words": True, **COLUMNS}
    assert ours(batch, **options).data == theirs(batch, **options).data


@same_fixture
@given(
    batch=st.lists(texts, min_size=1, max_size=3),
    padding=st.sampled_from([None, False, True, "longest", "max_length", "do_not_pad"]),
    truncation=st.sampled_from([None, False, True, "do_not_truncate", "only_first"]),
    max_length=st.sampled_from([None, 4, 6]),
)
def test_a_length_alone_does_what_it_does_in_transformers(
    ours: PreTrainedTokenizer,
    theirs: Any,
    batch: list[str],
    padding: Any,
    truncation: Any,
    max_length: int | None,
) -> None:
    for tokenizer in (ours, theirs):
        tokenizer.model_max_length = 50
    options: dict[str, Any] = {} if padding is None else {"padding": padding}
    options |= {"truncation": truncation, "max_length": max_length}
    mine, said = said_of_length(lambda: ours(batch, **options))
    other, their_warnings = said_of_length(lambda: theirs(batch, **options))
    assert mine.data == other.data
    if max_length is not None and padding != "max_length" and not said:
        cut = ours("a b c d e", **options)["input_ids"]
        assert len(cut) == max_length, "a length is either obeyed or warned of"
    assert bool(said) >= bool(their_warnings)


def test_a_length_cuts_a_single_text_and_ids(ours: PreTrainedTokenizer, theirs: Any) -> None:
    for options in ({"max_length": 4}, {"max_length": 5, "return_overflowing_tokens": True}):
        assert ours("a b c d e", **options).data == theirs("a b c d e", **options).data
    assert ours.encode("a b c d e", max_length=4) == theirs.encode("a b c d e", max_length=4)


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 1),
        ({"truncation": True}, 0),
        ({"max_length": 20}, 0),
        ({"padding": True}, 1),
        ({"return_tensors": "np"}, 1),
        ({"verbose": False}, 0),
    ],
)
def test_a_text_beyond_the_model_is_warned_of_once(
    ours: PreTrainedTokenizer, theirs: Any, options: dict[str, Any], times: int
) -> None:
    import transformers

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.tokenization_utils_base")
    transformers.utils.logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        for tokenizer in (ours, theirs):
            tokenizer.model_max_length = 4
        _, said = said_of_length(
            lambda: [ours(text, **options) for text in ("a b", "a b c", "a b c d")]
        )
        for text in ("a b", "a b c", "a b c d"):
            theirs(text, **options)
    finally:
        logger.removeHandler(handler)
    assert len(said) == len(heard) == times
    assert all("5 tokens and model_max_length is 4" in one for one in said)


def test_the_warning_has_a_class_and_is_forgotten_by_copies(ours: PreTrainedTokenizer) -> None:
    ours.model_max_length = 3
    fresh = pickle.dumps(ours)
    with pytest.warns(LongTextWarning) as seen:
        ours("a b c")
    assert seen[0].filename == __file__
    assert pickle.dumps(ours) == fresh
    with pytest.warns(LongTextWarning):
        pickle.loads(fresh)("a b c")


def test_a_conversation_beyond_the_model_is_warned_of(ours: PreTrainedTokenizer) -> None:
    ours.model_max_length = 3
    ours.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.warns(LongTextWarning):
        ours.apply_chat_template([{"role": "user", "content": "a b c d"}])
