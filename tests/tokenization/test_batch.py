import copy
import pickle

import pytest

from quintet.errors import InputError
from quintet.tokenization import BatchEncoding, Qwen2Tokenizer


def test_columns_unpack_into_a_call(tokenizer: Qwen2Tokenizer) -> None:
    def model(input_ids: list[int], attention_mask: list[int]) -> int:
        return len(input_ids) + len(attention_mask)

    batch = tokenizer("The fox")
    assert model(**batch) == 2 * len(batch["input_ids"])
    assert {**batch} == batch.data == dict(batch.items())
    assert list(batch) == ["input_ids", "attention_mask"]
    assert "labels" not in batch


def test_columns_are_items_and_attributes(tokenizer: Qwen2Tokenizer) -> None:
    batch = tokenizer(["a", "b"])
    assert batch.input_ids is batch["input_ids"]
    batch["labels"] = [1, 2]
    assert batch.labels == [1, 2]
    with pytest.raises(AttributeError, match="inputs_ids"):
        _ = batch.inputs_ids
    with pytest.raises(KeyError, match="there are input_ids"):
        _ = batch["ids"]
    assert batch[0:1] == {"input_ids": [[64]], "attention_mask": [[1]], "labels": [1]}


def test_copies_and_pickles_keep_the_columns(tokenizer: Qwen2Tokenizer) -> None:
    batch = BatchEncoding({"input_ids": [1]})
    assert copy.copy(batch).data == batch.data
    assert pickle.loads(pickle.dumps(batch)).data == batch.data


def test_tensors_are_integers_even_of_nothing(tokenizer: Qwen2Tokenizer) -> None:
    import torch

    batch = tokenizer("a b", return_tensors="pt")
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["input_ids"].shape[0] == 1
    empty = tokenizer("", return_tensors="pt")["input_ids"]
    assert empty.dtype == torch.int64
    assert empty.shape == (1, 0)
    arrays = tokenizer(["a", "b"], return_tensors="np")
    assert arrays["input_ids"].shape == (2, 1)


def test_to_moves_tensors_and_refuses_lists(tokenizer: Qwen2Tokenizer) -> None:
    batch = tokenizer("a b", return_tensors="pt")
    assert batch.to("meta")["input_ids"].device.type == "meta"
    with pytest.raises(InputError, match="return_tensors='pt'"):
        tokenizer("a b").to("cpu")


def test_rows_know_words_and_characters(tokenizer: Qwen2Tokenizer) -> None:
    batch = tokenizer(["It", "The quick"], padding=True, padding_side="left")
    text = "The quick"
    place = batch.char_to_token(1, text.index("quick"))
    assert place is not None
    start, end = batch.token_to_chars(1, place) or (0, 0)
    assert start <= text.index("quick") < end
    assert batch.char_to_token(1, 99) is None
    assert batch.word_to_tokens(1, 0) is not None
    assert batch[1].tokens == batch.tokens(1)
    assert batch.is_fast
    assert len(batch.encodings or []) == 2
    assert batch["attention_mask"][0] == [0, 1]
    assert batch.token_to_chars(0, 0) is None, "padding has no characters"


def test_a_batch_of_columns_has_no_rows() -> None:
    batch = BatchEncoding({"input_ids": [1]})
    assert not batch.is_fast
    with pytest.raises(InputError, match="has no rows"):
        batch.tokens()
