import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from quintet.errors import InputError
from quintet.tokenization import PreTrainedTokenizer, Qwen2Tokenizer

same_fixture = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
COLUMNS = {
    "return_offsets_mapping": True,
    "return_special_tokens_mask": True,
    "return_token_type_ids": True,
    "return_length": True,
}
words = st.lists(st.sampled_from(["the", " fox", "<|im_end|>", "42", "é", "\n"]), max_size=12)
texts = words.map("".join)


def surrounding() -> Tokenizer:
    """A pipeline that adds tokens around texts and pairs, as BERT's does."""
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
def bert() -> PreTrainedTokenizer:
    return PreTrainedTokenizer(surrounding(), pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def their_bert() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=surrounding(), pad_token="[PAD]", unk_token="[UNK]"
    )


@same_fixture
@given(
    batch=st.lists(texts, min_size=1, max_size=4),
    padding=st.sampled_from([False, True, "longest", "max_length", "do_not_pad"]),
    side=st.sampled_from(["left", "right"]),
    cut_side=st.sampled_from(["left", "right"]),
    truncation=st.sampled_from([False, True, "longest_first", "only_first"]),
    max_length=st.integers(1, 12),
    multiple=st.sampled_from([None, 4]),
)
def test_padding_and_truncation_are_those_of_transformers(
    tokenizer: Qwen2Tokenizer,
    oracle: Any,
    batch: list[str],
    padding: bool | str,
    side: str,
    cut_side: str,
    truncation: bool | str,
    max_length: int,
    multiple: int | None,
) -> None:
    options: dict[str, Any] = {"padding": padding, "padding_side": side, "truncation": truncation}
    if truncation or padding == "max_length":
        options["max_length"] = max_length
    if not truncation:
        options["pad_to_multiple_of"] = multiple
    tokenizer.truncation_side = cut_side  # type: ignore[assignment]
    oracle.truncation_side = cut_side
    ours, theirs = tokenizer(batch, **options, **COLUMNS), oracle(batch, **options, **COLUMNS)
    length = ours.data.pop("length")
    assert length == [len(row) for row in ours["input_ids"]]
    theirs.data.pop("length")
    assert ours.data == theirs.data
    assert ours.tokens(0) == theirs.tokens(0)
    assert ours.word_ids(0) == theirs.word_ids(0)


@same_fixture
@given(
    first=st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(" ".join),
    second=st.lists(st.sampled_from("def"), min_size=1, max_size=9).map(" ".join),
    truncation=st.sampled_from(["longest_first", "only_first", "only_second"]),
    cut_side=st.sampled_from(["left", "right"]),
    max_length=st.integers(4, 16),
)
def test_pairs_are_cut_as_transformers_cuts_them(
    bert: PreTrainedTokenizer,
    their_bert: Any,
    first: str,
    second: str,
    truncation: str,
    cut_side: str,
    max_length: int,
) -> None:
    bert.truncation_side = cut_side  # type: ignore[assignment]
    their_bert.truncation_side = cut_side
    options = {"truncation": truncation, "max_length": max_length, **COLUMNS}
    options.pop("return_length")
    try:
        theirs = their_bert(first, second, **options)
    except Exception:
        return
    ours = bert(first, second, **options)
    assert ours.data == dict(theirs)
    assert ours.sequence_ids() == theirs.sequence_ids()


@same_fixture
@given(
    question=st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(" ".join),
    context=st.lists(st.sampled_from("defghij"), min_size=1, max_size=20).map(" ".join),
    stride=st.integers(0, 2),
    cut_side=st.sampled_from(["left", "right"]),
)
def test_overflowing_windows_are_those_of_transformers(
    bert: PreTrainedTokenizer,
    their_bert: Any,
    question: str,
    context: str,
    stride: int,
    cut_side: str,
) -> None:
    bert.truncation_side = cut_side  # type: ignore[assignment]
    their_bert.truncation_side = cut_side
    options = {
        "truncation": "only_second",
        "max_length": 10,
        "stride": stride,
        "return_overflowing_tokens": True,
        "return_offsets_mapping": True,
        "padding": "max_length",
    }
    ours = bert([question, "a"], [context, "d e"], **options)
    theirs = their_bert([question, "a"], [context, "d e"], **options)
    assert ours.data == dict(theirs)


def test_words_keep_their_numbers(tokenizer: Qwen2Tokenizer, oracle: Any) -> None:
    words = [["The", "quick", "fox"], ["naïve"]]
    ours = tokenizer(words, is_split_into_words=True)
    theirs = oracle(words, is_split_into_words=True)
    assert ours["input_ids"] == theirs["input_ids"]
    assert ours.word_ids(0) == theirs.word_ids(0)
    single = tokenizer(words[0], is_split_into_words=True)
    assert single["input_ids"] == ours["input_ids"][0]


def test_stored_cutting_and_padding_do_not_leak_into_calls(tokenizer: Qwen2Tokenizer) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    ours = PreTrainedTokenizer(backend)
    assert ours("The quick brown fox")["input_ids"] == tokenizer.encode("The quick brown fox")
    assert backend.truncation is not None, "the caller's own pipeline is left alone"


def test_threads_with_different_options_do_not_disturb_each_other(
    tokenizer: Qwen2Tokenizer,
) -> None:
    text = "The quick brown fox<|im_end|>" * 20
    whole, split = tokenizer.encode(text), tokenizer.encode(text, split_special_tokens=True)
    wrong = []

    def work(turn: int) -> None:
        for _ in range(30):
            if turn % 3 == 0 and tokenizer.encode(text) != whole:
                wrong.append("whole")
            if turn % 3 == 1 and len(tokenizer.encode(text, truncation=True, max_length=5)) != 5:
                wrong.append("cut")
            if turn % 3 == 2 and tokenizer.encode(text, split_special_tokens=True) != split:
                wrong.append("split")

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_megabyte_takes_linear_time(tokenizer: Qwen2Tokenizer) -> None:
    import time

    for piece in ("a", " ", "\u0301", "👩‍👧", "\u202e", "\r\n"):
        start = time.thread_time()
        tokenizer(piece * (1_000_000 // len(piece.encode())))
        assert time.thread_time() - start < 20


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (5, {}, "text has to be a string, not int"),
        ([["a"]], {}, "is_split_into_words=True"),
        ([("a", "b", "c")], {}, "tuple of 3; a pair has two"),
        ([("a", ["b"])], {}, r"text\[0\]\[1\] has to be a string, not list of 1"),
        ([(["a"], "b")], {"is_split_into_words": True}, r"text\[0\] has to be a list of words"),
        ("a", {"is_split_into_words": True}, "a list of words"),
        ("a", {"paddin": True}, "did you mean 'padding'"),
        ("a", {"padding": "longst"}, "'longest'"),
        ("a", {"truncation": "first"}, "'only_first'"),
        ("a", {"stride": 3}, "need truncation=True"),
        ("a", {"padding": "max_length"}, "needs max_length"),
        ("a", {"padding": True, "padding_side": "top"}, "'left', 'right'"),
        ("a", {"return_tensors": "tf"}, "'pt', 'np'"),
        (["a", "a b c"], {"return_tensors": "np"}, "pass padding=True"),
        ("a\ud800", {}, "surrogate"),
        ("aa b", {"truncation": True, "max_length": 4, "padding": True, "pad_to_multiple_of": 3},
         "not a multiple"),
        ("a", {"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of=0 has to be"),
        ("a", {"padding": True, "pad_to_multiple_of": 1.5}, "pad_to_multiple_of=1.5 has to be"),
        ("a", {"padding": True, "pad_to_multiple_of": "8"}, "pad_to_multiple_of='8' has to be"),
        ("a", {"padding": True, "pad_to_multiple_of": 10**9}, "at most 16777216"),
        ("a", {"padding": "max_length", "max_length": 2**40}, "at most 16777216"),
        ("a", {"padding": "max_length", "max_length": 10**400}, "at most 16777216"),
        ("a b c d e f", {"truncation": True, "max_length": 2, "stride": 2,
                         "return_overflowing_tokens": True}, "stride=2"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(
    tokenizer: Qwen2Tokenizer, text: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        tokenizer(text, **options)


def test_pairs_have_to_match(tokenizer: Qwen2Tokenizer, bert: PreTrainedTokenizer) -> None:
    with pytest.raises(InputError, match="2 texts but 1 pairs"):
        tokenizer(["a", "b"], ["c"])
    with pytest.raises(InputError, match=r"text\[0\] has to be a string, not tuple"):
        tokenizer([("a", "b")], ["c"])
    with pytest.raises(InputError, match="has to be one too"):
        tokenizer(["a", "b"], "c")
    with pytest.raises(InputError, match="no room for the 3 tokens"):
        bert("a", "b", truncation=True, max_length=2)
    with pytest.raises(InputError, match="has to remove 4 tokens"):
        bert("a b c d e f g", "h", truncation="only_second", max_length=7)


def test_padding_without_a_token_says_how_to_get_one(tokenizer: Qwen2Tokenizer) -> None:
    tokenizer.pad_token = None
    with pytest.raises(InputError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        tokenizer(["a", "b c"], padding=True)


def test_pad_fills_rows_that_are_ids(tokenizer: Qwen2Tokenizer, oracle: Any) -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    for side in ("left", "right"):
        ours = tokenizer.pad(rows, padding_side=side, return_tensors="np")
        theirs = oracle.pad(rows, padding_side=side, return_tensors="np")
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert ours["attention_mask"].tolist() == theirs["attention_mask"].tolist()
    with_labels = tokenizer.pad({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]})
    assert with_labels["labels"] == [[1, 2], [3, -100]]
    with pytest.raises(InputError, match="'input_ids'"):
        tokenizer.pad([{"ids": [1]}])
    with pytest.raises(InputError, match="'words'"):
        tokenizer.pad({"input_ids": [[1, 2], [3]], "words": [[1, 2], [3]]})


def test_the_models_limit_is_used_where_no_length_is_given(tokenizer: Qwen2Tokenizer) -> None:
    assert len(tokenizer("a b c d", truncation=True)["input_ids"]) == 7
    tokenizer.model_max_length = 2
    assert len(tokenizer("a b c d", truncation=True)["input_ids"]) == 2
    assert len(tokenizer("a", padding="max_length")["input_ids"]) == 2


def test_the_column_of_ids_is_named_by_the_model(tokenizer: Qwen2Tokenizer) -> None:
    ids = tokenizer.encode("the fox")
    tokenizer.model_input_names = ["decoder_input_ids", "attention_mask"]
    assert tokenizer.encode("the fox") == tokenizer("the fox")["decoder_input_ids"] == ids


@pytest.mark.parametrize(
    "wrong", [None, 3, "x", [], [1], [[1], ["a"]], {"input_ids": None}, [{"input_ids": [1]}, 3]]
)
def test_what_is_no_row_is_not_padded(tokenizer: Qwen2Tokenizer, wrong: Any) -> None:
    with pytest.raises(InputError, match="pad "):
        tokenizer.pad(wrong)


@pytest.mark.parametrize("wrong", ["x", "", [1], {"a": 1}, b"x", float("nan"), 2.5])
@pytest.mark.parametrize("name", ["max_length", "stride", "pad_to_multiple_of"])
def test_a_length_is_a_whole_number(tokenizer: Qwen2Tokenizer, name: str, wrong: Any) -> None:
    options: dict[str, Any] = {"truncation": True, "padding": True, name: wrong}
    with pytest.raises(InputError, match=name):
        tokenizer("text", **options)
    if name != "stride":
        with pytest.raises(InputError, match=name):
            tokenizer.pad({"input_ids": [[1, 2]]}, padding="max_length", **{name: wrong})
