"""`pipeline(…)`: which task, which model, where; and inputs that come one after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import quintet
from pipelines.conftest import Made, close
from quintet import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from quintet.errors import InputError
from quintet.modeling.loading import NewHeadWarning
from quintet.pipelines import Pipeline
from quintet.pipelines.factory import TASKS

TEXTS = ["Hello there", "The quick brown fox", "a", "The lazy dog.", "def"]
SEQUENCE = "ForSequenceClassification"


# -- tasks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("ForCausalLM", "text-generation"),
        (SEQUENCE, "text-classification"),
        ("ForTokenClassification", "token-classification"),
        ("ForQuestionAnswering", "question-answering"),
        ("Model", "feature-extraction"),
    ],
)
def test_a_model_says_what_it_is_for(head: str, task: str, headed: Made) -> None:
    made = pipeline(model=headed(head))
    assert made.task == task
    assert type(made).task in TASKS
    assert pipeline(model=made.model, tokenizer=made.tokenizer).task == task


@pytest.mark.parametrize(
    ("alias", "head", "task"),
    [
        ("sentiment-analysis", SEQUENCE, "text-classification"),
        ("ner", "ForTokenClassification", "token-classification"),
    ],
)
def test_other_names(alias: str, head: str, task: str, headed: Made) -> None:
    assert pipeline(alias, headed(head)).task == task


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("text-genration", "did you mean 'text-generation'"),
        ("sentiment", "did you mean 'sentiment-analysis'"),
        ("translation", "there are text-generation"),
    ],
)
def test_an_unknown_task_names_the_nearest(task: str, said: str) -> None:
    with pytest.raises(InputError, match=f"there is no task '{task}'; .*{said}"):
        pipeline(task)


def test_only_text_generation_has_a_model_of_its_own() -> None:
    with pytest.raises(InputError, match="question-answering has no model of its own"):
        pipeline("question-answering")


# -- models ----------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused(headed: Made) -> None:
    root = headed("Model")
    model, tokenizer = AutoModel.from_pretrained(root), AutoTokenizer.from_pretrained(root)
    with pytest.raises(InputError, match=r"Qwen2Model does not fit .*AutoModelForSeq"):
        pipeline("text-classification", model, tokenizer=tokenizer)


def test_a_head_that_is_missing_is_told(headed: Made) -> None:
    with pytest.warns(NewHeadWarning):
        pipeline("text-classification", headed("Model"))


def test_a_config_in_place_of_the_checkpoints(headed: Made) -> None:
    root = headed(SEQUENCE)
    config = quintet.AutoConfig.from_pretrained(root, id2label={0: "no", 1: "yes"})
    made = pipeline("text-classification", root, config=config)
    assert made("Hello")[0]["label"] in ("no", "yes")
    assert pipeline("text-classification", root, config=str(root))("Hello")


def test_dtype_and_device(headed: Made) -> None:
    made = pipeline("text-classification", headed(SEQUENCE), dtype="bfloat16", device=-1)
    assert made.dtype == torch.bfloat16
    assert made.device == torch.device("cpu")
    assert 0 < made("Hello")[0]["score"] <= 1


def test_a_pipeline_is_saved_and_read(headed: Made, tmp_path: Path) -> None:
    made = pipeline("text-classification", headed(SEQUENCE))
    made.save_pretrained(tmp_path / "copy")
    assert pipeline(model=tmp_path / "copy")(TEXTS) == made(TEXTS)


def test_an_option_of_no_task_is_refused(headed: Made) -> None:
    with pytest.raises(InputError, match="no option 'topk'; did you mean 'top_k'"):
        pipeline("text-classification", headed(SEQUENCE), topk=2)


# -- streams ---------------------------------------------------------------------------------


class Counted(Dataset[str]):
    """A dataset as PyTorch has them: a length and places, and no way to go through."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, place: int) -> str:
        self.read.append(place)
        return TEXTS[place % len(TEXTS)]


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_a_stream_is_read_as_its_results_are_taken(batch_size: int, headed: Made) -> None:
    made = pipeline("text-classification", headed(SEQUENCE))
    expected = made(TEXTS)
    taken: list[str] = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            taken.append(text)
            yield text

    results = made(texts(), batch_size=batch_size)
    assert not taken
    first = next(results)
    assert len(taken) == min(batch_size, len(TEXTS))
    assert close([first, *results], expected)


def test_a_dataset_is_a_stream(headed: Made) -> None:
    made = pipeline("text-classification", headed(SEQUENCE))
    dataset = Counted()
    results = made(dataset, batch_size=2)
    assert not dataset.read
    assert close(list(results), made(TEXTS))
    assert dataset.read == [0, 1, 2, 3, 4]


def test_an_endless_stream(headed: Made) -> None:
    made = pipeline("feature-extraction", headed("Model"))

    def endless() -> Iterator[str]:
        while True:
            yield "Hello"

    results = made(endless(), batch_size=3)
    assert close(next(results), made("Hello"))


def test_an_option_is_checked_before_anything_is_read(headed: Made) -> None:
    made = pipeline("text-classification", headed(SEQUENCE))
    with pytest.raises(InputError, match="no option"):
        made((text for text in TEXTS), topk=1)
    with pytest.raises(InputError, match="batch_size=0"):
        pipeline("text-classification", headed(SEQUENCE), batch_size=0)


@pytest.mark.parametrize("given", [3, None, b"bytes"], ids=str)
def test_what_cannot_be_gone_through_is_refused(given: Any, headed: Made) -> None:
    made: Pipeline = pipeline("text-classification", headed(SEQUENCE))
    with pytest.raises(InputError, match="text-classification cannot take a"):
        made(given)


def test_a_loaded_model_is_taken_as_it_is(headed: Made) -> None:
    root = headed(SEQUENCE)
    model = AutoModelForSequenceClassification.from_pretrained(root)
    made = pipeline(model=model, tokenizer=root)
    assert made.model is model
