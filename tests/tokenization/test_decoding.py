from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from quintet.errors import InputError
from quintet.tokenization import PreTrainedTokenizer, Qwen2Tokenizer

same_fixture = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@same_fixture
@given(ids=st.lists(st.integers(0, 460)), skip=st.booleans())
def test_text_is_that_of_transformers(
    tokenizer: Qwen2Tokenizer, oracle: Any, ids: list[int], skip: bool
) -> None:
    ours = tokenizer.decode(ids, skip_special_tokens=skip)
    assert ours == oracle.decode(ids, skip_special_tokens=skip)
    tokenizer.errors = "surrogateescape"
    escaped = tokenizer.decode(ids, skip)
    tokenizer.errors = "replace"
    assert escaped.encode("utf-8", "surrogateescape").decode("utf-8", "replace") == ours


def test_ids_may_come_in_any_container(tokenizer: Qwen2Tokenizer) -> None:
    ids = tokenizer.encode("The fox")
    for given_ids in (
        ids,
        tuple(ids),
        np.array(ids),
        torch.tensor(ids),
        [np.int64(i) for i in ids],
    ):
        assert tokenizer.decode(given_ids) == "The fox"
    assert tokenizer.decode(ids[0]) == tokenizer.decode([ids[0]])
    assert tokenizer.decode(torch.tensor(ids[0])) == tokenizer.decode([ids[0]])
    assert tokenizer.decode([]) == ""


def test_rows_decode_one_by_one(tokenizer: Qwen2Tokenizer) -> None:
    rows = tokenizer(["The fox", "a"], padding=True)["input_ids"]
    for given_rows in (rows, np.array(rows), torch.tensor(rows), [torch.tensor(r) for r in rows]):
        assert tokenizer.batch_decode(given_rows, skip_special_tokens=True) == ["The fox", "a"]
        assert tokenizer.decode(given_rows, skip_special_tokens=True) == ["The fox", "a"]
    assert tokenizer.batch_decode([]) == []
    assert tokenizer.batch_decode(rows[0]) == ["The fox"]


def test_ids_outside_of_the_vocabulary_give_no_text(tokenizer: Qwen2Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("a"), 151_900]) == "a"


@pytest.mark.parametrize("ids", [[-100, 3], "abc", [1.5], [[1], 2], [1, [2]], None, [True]])
def test_what_is_no_id_is_refused(tokenizer: Qwen2Tokenizer, ids: Any) -> None:
    with pytest.raises(InputError, match="id"):
        tokenizer.decode(ids)


def test_spaces_are_cleaned_up_only_where_a_pipeline_adds_them(tokenizer: Qwen2Tokenizer) -> None:
    text = "the , fox . it 's"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == text
    pieces = Tokenizer(models.WordPiece({"hello": 0, ",": 1, "[UNK]": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece(cleanup=False)
    words = PreTrainedTokenizer(pieces)
    assert words.decode([0, 1, 0]) == "hello , hello"
    assert words.decode([0, 1, 0], clean_up_tokenization_spaces=True) == "hello, hello"


def test_tokens_join_to_text(tokenizer: Qwen2Tokenizer, oracle: Any) -> None:
    tokens = tokenizer.tokenize("naïve 你好")
    assert tokenizer.convert_tokens_to_string(tokens) == "naïve 你好"
    assert oracle.convert_tokens_to_string(tokens) == "naïve 你好"
