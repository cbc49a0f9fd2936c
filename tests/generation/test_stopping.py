"""What ends a row."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.generation import stopping_criteria as theirs

from quintet import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from quintet.errors import InputError


@pytest.fixture(scope="module")
def opened(chat_model: Path) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(chat_model),
        AutoTokenizer.from_pretrained(chat_model),
    )


@pytest.fixture
def prompt(opened: tuple[Any, Any]) -> dict[str, Tensor]:
    return dict(opened[1](["Hello there"], return_tensors="pt"))


def new_text(opened: tuple[Any, Any], prompt: dict[str, Tensor], **options: Any) -> list[int]:
    model, tokenizer = opened
    out = model.generate(**prompt, tokenizer=tokenizer, max_new_tokens=24, **options)
    row: list[int] = out[0, prompt["input_ids"].shape[1] :].tolist()
    return row


# -- strings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["the quick brown", "naïve café", "你好,世界。", "🙂🙃 12"])
def test_a_string_ends_a_row_wherever_tokens_begin_and_end(
    opened: tuple[Any, Any], text: str
) -> None:
    tokenizer = opened[1]
    ids = tokenizer(f"Hello {text} and more")["input_ids"]
    whole = tokenizer.decode(ids)
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            stop = text[start:end]
            criterion = StopStringCriteria(tokenizer, stop)
            found = [bool(criterion(torch.tensor([ids[:n]]), None)) for n in range(1, len(ids) + 1)]
            # The tokens in which an occurrence comes to its end.
            expected, at = set(), whole.find(stop)
            while at >= 0:
                lengths = [len(tokenizer.decode(ids[:n]).rstrip("\ufffd")) for n in range(len(ids))]
                expected.add(
                    next(
                        n
                        for n in range(len(ids))
                        if n + 1 == len(ids) or lengths[n + 1] >= at + len(stop)
                    )
                )
                at = whole.find(stop, at + 1)
            assert {n for n, ends in enumerate(found) if ends} == expected, stop


def test_strings_match_as_in_transformers(opened: tuple[Any, Any], chat_model: Path) -> None:
    tokenizer = opened[1]
    other = transformers.AutoTokenizer.from_pretrained(chat_model)
    text = "system user assistant You are a helpful assistant. def fibonacci(n): return n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    for stops in (["help"], ["a"], [" assistant."], ["(n):", "zzz"], ["bon", "are a"], ["urn n"]):
        mine = StopStringCriteria(tokenizer, stops)
        told = theirs.StopStringCriteria(other, stops)
        for n in range(1, ids.shape[1] + 1):
            assert mine(ids[:, :n], None).tolist() == told(ids[:, :n], None).tolist(), (stops, n)


def test_generation_ends_at_a_string(opened: tuple[Any, Any], prompt: dict[str, Tensor]) -> None:
    tokenizer = opened[1]
    free = new_text(opened, prompt)
    text = tokenizer.decode(free)
    # A piece that lies across several tokens, without half of a character.
    stop = next(text[i : i + 4] for i in range(3, len(text) - 4) if "\ufffd" not in text[i : i + 4])
    ended = new_text(opened, prompt, stop_strings=["never there", stop])
    assert ended == free[: len(ended)]
    assert len(ended) < len(free)
    assert stop in tokenizer.decode(ended)
    assert stop not in tokenizer.decode(ended[:-1])


def test_a_row_that_ended_at_a_string_is_padded(opened: tuple[Any, Any]) -> None:
    model, tokenizer = opened
    inputs = tokenizer(["Hello there", "The quick"], return_tensors="pt", padding=True)
    length = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, max_new_tokens=12)
    stop = tokenizer.decode(free[0, length + 4])
    rows = model.generate(**inputs, max_new_tokens=12, tokenizer=tokenizer, stop_strings=stop)
    assert rows.shape[1] > length + 5 or stop in tokenizer.decode(free[1, length:])
    assert stop in tokenizer.decode(rows[0, length:])
    assert set(rows[0, length + 5 :].tolist()) <= {0}


@pytest.mark.parametrize("stops", ["", [], ["a", ""], [3]])
def test_strings_are_texts(opened: tuple[Any, Any], stops: Any) -> None:
    with pytest.raises(InputError, match="has to be texts, none of them empty"):
        StopStringCriteria(opened[1], stops)


def test_strings_need_the_tokenizer(opened: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"stop_strings='x' needs the tokenizer: generate\("):
        opened[0].generate(torch.tensor([[5]]), stop_strings="x")


# -- time and length ---------------------------------------------------------------------------


def test_no_token_is_begun_after_max_time(
    opened: tuple[Any, Any], prompt: dict[str, Tensor]
) -> None:
    def slow(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        time.sleep(0.02)
        return torch.zeros(len(ids), dtype=torch.bool)

    assert len(new_text(opened, prompt, max_time=0.0)) == 1
    some = len(new_text(opened, prompt, max_time=0.1, stopping_criteria=[slow]))
    assert 1 <= some < 24
    assert len(new_text(opened, prompt, max_time=3600.0)) == 24
    assert not MaxTimeCriteria(3600.0)(torch.ones(2, 3), None).any()
    assert MaxTimeCriteria(1.0, time.time() - 2)(torch.ones(2, 3), None).tolist() == [True, True]


def test_a_length_of_the_callers_goes_before_the_options(
    opened: tuple[Any, Any], prompt: dict[str, Tensor]
) -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(30)])
    assert criteria.max_length == 30
    out = opened[0].generate(**prompt, stopping_criteria=criteria)
    assert out.shape[1] == 30
    assert MaxLengthCriteria(3)(torch.ones(2, 3), None).tolist() == [True, True]


# -- criteria of the caller's ------------------------------------------------------------------


def test_a_criterion_of_the_callers_ends_each_row_by_itself(opened: tuple[Any, Any]) -> None:
    class Sixth(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.tensor([input_ids.shape[1] == 6, False])

    ids = torch.tensor([[5, 6], [7, 8]])
    free = opened[0].generate(ids, max_new_tokens=9)
    rows = opened[0].generate(ids, max_new_tokens=9, stopping_criteria=[Sixth()], pad_token_id=0)
    assert rows[0].tolist() == [*free[0, :6].tolist(), 0, 0, 0, 0, 0]
    assert rows[1].tolist() == free[1].tolist()


def test_one_truth_ends_all(opened: tuple[Any, Any], prompt: dict[str, Tensor]) -> None:
    made = new_text(opened, prompt, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 8])
    assert len(made) == 8 - prompt["input_ids"].shape[1]


def test_scores_reach_a_criterion(opened: tuple[Any, Any], prompt: dict[str, Tensor]) -> None:
    seen: list[int | None] = []

    def watching(ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        seen.append(None if scores is None else len(scores))
        return False

    options = {"max_new_tokens": 3, "stopping_criteria": [watching]}
    opened[0].generate(**prompt, **options)
    opened[0].generate(**prompt, **options, return_dict_in_generate=True, output_scores=True)
    assert seen == [None, None, None, 1, 2, 3]


def test_ends_of_the_callers_take_the_place_of_the_configs(
    opened: tuple[Any, Any], prompt: dict[str, Tensor]
) -> None:
    free = new_text(opened, prompt)
    last = next(n for n in range(3, 24) if free[n] not in free[:n])
    own = EosTokenCriteria([free[last]])
    early = next(n for n in range(last) if free[n] not in free[:n])
    made = new_text(opened, prompt, eos_token_id=free[early], stopping_criteria=[own])
    assert made == free[: last + 1]
