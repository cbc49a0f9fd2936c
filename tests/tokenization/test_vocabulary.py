from typing import Any

import pytest
from tokenizers import AddedToken

from quintet.errors import InputError, TokenizerError
from quintet.tokenization import Qwen2Tokenizer


def test_sizes_count_with_and_without_added_tokens(tokenizer: Qwen2Tokenizer, oracle: Any) -> None:
    assert tokenizer.vocab_size == oracle.vocab_size
    assert len(tokenizer) == len(oracle) == tokenizer.vocab_size + 3
    assert tokenizer.get_vocab() == oracle.get_vocab()
    assert tokenizer.all_special_tokens == oracle.all_special_tokens
    assert tokenizer.all_special_ids == oracle.all_special_ids


def test_tokens_and_ids_convert_both_ways(tokenizer: Qwen2Tokenizer, oracle: Any) -> None:
    ids = tokenizer.encode("The fox<|im_end|>")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == oracle.convert_ids_to_tokens(ids)
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) == tokens[:-1]
    assert tokenizer.convert_tokens_to_ids("no such token") == tokenizer.unk_token_id
    assert tokenizer.convert_tokens_to_ids(None) is None
    for wrong in (5, 1.5, b"x"):
        with pytest.raises(InputError, match="give a token, or several"):
            tokenizer.convert_tokens_to_ids(wrong)  # type: ignore[call-overload]
    for wrong in (None, 1.5, "ab"):
        with pytest.raises(InputError, match="give an id, or several"):
            tokenizer.convert_ids_to_tokens(wrong)  # type: ignore[call-overload]
    assert tokenizer.convert_ids_to_tokens(10**30) is None
    assert tokenizer.convert_ids_to_tokens(10**6) is None
    with pytest.raises(InputError, match="-1 is not a token id"):
        tokenizer.convert_ids_to_tokens(-1)


def test_added_tokens_are_found_before_anything_else(tokenizer: Qwen2Tokenizer) -> None:
    size = len(tokenizer)
    assert tokenizer.add_tokens(["quick fox", AddedToken("zzz")]) == 2
    assert tokenizer.add_tokens("quick fox") == 0
    assert len(tokenizer) == size + 2
    assert size in tokenizer.encode("the quick fox")


def test_new_special_tokens_get_a_role(tokenizer: Qwen2Tokenizer) -> None:
    assert tokenizer.add_special_tokens({"pad_token": "[PAD]", "sep_token": "<|im_end|>"}) == 1
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.sep_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]}, False)
    assert tokenizer.additional_special_tokens == ["<|im_start|>", "<|im_end|>", "<x>"]
    assert tokenizer.decode(tokenizer.encode("a<x>[PAD]"), skip_special_tokens=True) == "a"
    with pytest.raises(InputError, match="did you mean 'pad_token'"):
        tokenizer.add_special_tokens({"pad_tokn": "[PAD]"})


def test_roles_can_be_set_to_known_tokens_only(tokenizer: Qwen2Tokenizer) -> None:
    tokenizer.eos_token = "<|im_end|>"
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.special_tokens_map["eos_token"] == "<|im_end|>"
    tokenizer.pad_token_id = tokenizer.eos_token_id
    assert tokenizer.pad_token == "<|im_end|>"
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    with pytest.raises(TokenizerError, match="add_special_tokens"):
        tokenizer.eos_token = "<nowhere>"
    with pytest.raises(InputError, match="pad_token_id=99999"):
        tokenizer.pad_token_id = 99999


@pytest.mark.parametrize("wrong", [None, 3, [3], [None], [["a"]], b"x", {"a": 1}.items(), "\ud800"])
def test_what_is_no_token_is_not_added(tokenizer: Qwen2Tokenizer, wrong: Any) -> None:
    size = len(tokenizer)
    with pytest.raises(InputError, match="new_tokens"):
        tokenizer.add_tokens(wrong)
    assert len(tokenizer) == size


@pytest.mark.parametrize("wrong", [None, 3, [3], "pad_token"])
def test_special_tokens_come_by_role(tokenizer: Qwen2Tokenizer, wrong: Any) -> None:
    with pytest.raises(InputError, match="special_tokens_dict"):
        tokenizer.add_special_tokens(wrong)
