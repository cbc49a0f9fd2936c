"""A tokenizer handed to Transformers is the same tokenizer."""

import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from quintet import AutoTokenizer, PreTrainedTokenizer
from quintet.errors import MissingDependencyError
from quintet.interop import to_transformers
from quintet.tokenization import IncrementalDecoder

TEXTS = ["Hello there, it's 42!", "  two  spaces\n\n", "naïve 你好 🙂", "", "a<s>b</s><|im_end|> c"]
CHAT = [{"role": "user", "content": "Hi  <s>"}, {"role": "assistant", "content": "naïve"}]


@pytest.mark.filterwarnings("ignore::quintet.tokenization.LongTextWarning")
@pytest.mark.parametrize("options", [{}, {"padding_side": "left", "model_max_length": 7}])
def test_ids_text_and_chats_are_the_same(chat_model: Path, options: dict[str, Any]) -> None:
    ours = AutoTokenizer.from_pretrained(chat_model, **options)
    same(ours)


def test_roles_and_lengths_are_carried(chat_model: Path) -> None:
    ours = AutoTokenizer.from_pretrained(chat_model, padding_side="left", model_max_length=7)
    theirs = to_transformers(ours)
    assert theirs.special_tokens_map == ours.special_tokens_map
    assert theirs.chat_template == ours.chat_template
    assert (theirs.padding_side, theirs.truncation_side) == ("left", ours.truncation_side)
    assert theirs.model_max_length == 7
    assert len(theirs) == len(ours)
    theirs.add_tokens(["<new>"])
    assert len(theirs) == len(ours) + 1


def same(ours: PreTrainedTokenizer) -> None:
    theirs = to_transformers(ours)
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert theirs(text)["input_ids"] == ids
        for skip in (False, True):
            assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(
                ids, skip_special_tokens=skip
            )
    if ours.pad_token is not None:
        assert dict(theirs(TEXTS, padding=True)) == ours(TEXTS, padding=True).data
    for prompt in (False, True):
        options: dict[str, Any] = {"add_generation_prompt": prompt, "tokenize": False}
        assert theirs.apply_chat_template(CHAT, **options) == ours.apply_chat_template(
            CHAT, **options
        )


def test_its_text_streams_as_ours_does(chat_model: Path) -> None:
    ours = AutoTokenizer.from_pretrained(chat_model)
    ids = ours("naïve 你好 <s> there")["input_ids"]
    texts = []
    for tokenizer in (ours, to_transformers(ours)):
        stream = IncrementalDecoder(tokenizer, skip_special_tokens=True)
        texts.append([*map(stream.push, ids), stream.flush()])
    assert texts[0] == texts[1]
    assert "".join(texts[0]) == ours.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_hands_itself_over(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = AutoTokenizer.from_pretrained(chat_model)
    theirs = ours.to_transformers()
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    assert theirs(TEXTS[0])["input_ids"] == ours(TEXTS[0])["input_ids"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install transformers"):
        ours.to_transformers()
