"""Options of every task: each is what it says it is, None lifts it, and nothing ends raw."""

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
import transformers

from pipelines.conftest import Made
from quintet import GenerationConfig, pipeline
from quintet.errors import InputError, QuintetError
from quintet.pipelines.factory import TASKS

HEADS = {
    "text-generation": "ForCausalLM",
    "text-classification": "ForSequenceClassification",
    "zero-shot-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "feature-extraction": "Model",
}
LABELS = {0: "contradiction", 1: "entailment"}
INPUTS: dict[str, Any] = {"question-answering": {"question": "who?", "context": "it was me"}}
NEEDED: dict[str, dict[str, Any]] = {
    "text-generation": {"max_new_tokens": 2, "do_sample": False},
    "zero-shot-classification": {"candidate_labels": ["a", "b"]},
}
HOSTILE: list[Any] = [object(), "zz", -1, 0, float("nan"), 1.5, [], {}, b"x", [None], 10**30]
tasks = pytest.mark.parametrize("task", HEADS)


def made(task: str, headed: Made) -> Any:
    labels = {"id2label": LABELS} if task == "zero-shot-classification" else {}
    return pipeline(task, headed(HEADS[task], **labels))


def answer(pipe: Any, task: str, **options: Any) -> Any:
    return pipe(INPUTS.get(task, "hi there"), **{**NEEDED.get(task, {}), **options})


def test_every_task_is_tried() -> None:
    assert HEADS.keys() == TASKS.keys()


@tasks
def test_none_is_the_default(task: str, headed: Made) -> None:
    pipe = made(task, headed)
    plain, needed = answer(pipe, task), NEEDED.get(task, {})
    for option in dataclasses.fields(pipe.options_class):
        if option.name in ("generation", "top_k") or option.name in needed:
            continue  # not an option by itself; None of it means all; without it there is no task
        told = answer(pipe, task, **{option.name: None})
        assert str(told) == str(plain), option.name


@tasks
def test_none_lifts_what_the_pipeline_sets(task: str, headed: Made) -> None:
    if task != "text-generation":
        return
    pipe = pipeline(task, headed("ForCausalLM"), prefix="a b c", return_full_text=False)
    plain = made(task, headed)
    assert answer(pipe, task, prefix=None, return_full_text=None) == answer(plain, task)


@tasks
def test_a_value_is_taken_or_named(task: str, headed: Made) -> None:
    pipe = made(task, headed)
    for option in dataclasses.fields(pipe.options_class):
        for value in HOSTILE:
            with contextlib.suppress(QuintetError):
                answer(pipe, task, **{option.name: value})
        with pytest.raises(InputError, match=option.name):
            answer(pipe, task, **{option.name: object()})
    for size in (0, -1, 1.5, "2", True):
        with pytest.raises(InputError, match="batch_size"):
            answer(pipe, task, batch_size=size)


@tasks
def test_scores_that_are_no_numbers_are_no_answer(task: str, headed: Made) -> None:
    if task == "feature-extraction":
        return  # which returns them as they are
    pipe = made(task, headed)
    with torch.no_grad():
        for parameter in list(pipe.model.parameters())[-2:]:
            parameter.fill_(torch.nan)
    with pytest.raises(InputError, match="NaN"):
        answer(pipe, task)


def test_what_generate_is_given(headed: Made) -> None:
    pipe = made("text-generation", headed)
    plain = answer(pipe, "text-generation")
    for config in (GenerationConfig(), transformers.GenerationConfig()):
        config.max_new_tokens = 2
        assert pipe("hi there", generation_config=config, do_sample=False) == plain
    assert answer(pipe, "text-generation", tokenizer=pipe.tokenizer) == plain
    assert answer(pipe, "text-generation", tokenizer=None, attention_mask=None) == plain
    for name in ("inputs", "input_ids", "attention_mask"):
        with pytest.raises(InputError, match=f"{name} is made of the input"):
            answer(pipe, "text-generation", **{name: torch.ones(1, 2)})
    for wrong in ({"max_new_tokens": 2}, [GenerationConfig()], 5):
        with pytest.raises(InputError, match="generation_config is a"):
            answer(pipe, "text-generation", generation_config=wrong)
