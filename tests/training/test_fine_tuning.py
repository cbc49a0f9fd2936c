"""Conversations and preferences, from a file to the adapter that PEFT loads."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from comparisons import calmed
from pefts import QUIET, peft
from quintet import AutoModelForCausalLM, AutoTokenizer
from quintet.training import TrainingConfig, TrainingResult, train
from quintet.training.data import build_data
from quintet.training.objectives import Preference
from quintet.training.progress import Progress
from quintet.training.records import Silent, StepRecord
from quintet.training.settings import build

pytestmark = QUIET
CHATS = {"Hello there": "how are you", "Be brief": "naïve café", "Who is it": "the lazy dog"}
# The better answer is the one without a name.
PAIRS = [(f"Hello {n}", "the lazy dog", "the lazy dog def fibonacci") for n in range(8)]
HELD_PAIRS = [(f"Be brief {n}", "how are you", "how are you def fibonacci") for n in range(4)]


class Remembering(Silent):
    """Keeps what is told of steps."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)


def lines(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def conversations(path: Path) -> str:
    return lines(
        path,
        (
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in CHATS.items()
        ),
    )


def preferences(path: Path, pairs: list[tuple[str, str, str]]) -> str:
    names = ("prompt", "chosen", "rejected")
    return lines(path, (dict(zip(names, pair, strict=True)) for pair in pairs))


def ran(tables: Mapping[str, Any], folder: Path) -> tuple[TrainingResult, Remembering]:
    told = Remembering()
    whole = {**tables, "train": {"folder": str(folder / "run"), **tables["train"]}}
    whole["data"] = {"cache": str(folder / "cache"), **tables["data"]}
    return train(build(TrainingConfig, whole), report=told), told


def answer(model: Any, tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text: str = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


@pytest.fixture(scope="module")
def base(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model that chats, at a spread of weights that rounds little."""
    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    calmed(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_conversations_are_learned_and_the_adapter_is_pefts(
    base: Path, quantize: str | None, tmp_path: Path
) -> None:
    before = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert not any(answer(before, tokenizer, q).startswith(a) for q, a in CHATS.items())
    tables = {
        "model": {"from": str(base), **({"quantize": quantize} if quantize else {})},
        "adapter": {"r": 8, "lora_alpha": 16.0},
        "data": {
            "sources": [{"paths": [conversations(tmp_path / "chats.jsonl")]}],
            "context": 64,
            "batch_rows": 2,
        },
        "optimizer": {"learning_rate": 0.02, "weight_decay": 0.0, "schedule": {"kind": "linear"}},
        "train": {"steps": 50},
    }
    result, told = ran(tables, tmp_path)
    losses = [record.loss for record in told.steps]
    assert losses[-1] < 0.3 * losses[0]
    for question, taught in CHATS.items():
        # The head, which is left as it is, has nothing for the token that ends an answer.
        assert answer(result.model, tokenizer, question).startswith(taught)
    assert {p.name for p in result.path.iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    assert not (result.path / "model.safetensors").exists()

    ours = AutoModelForCausalLM.from_pretrained(base)
    ours.load_adapter(result.path)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), result.path
    ).eval()
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        mine, other = ours(ids).logits, theirs(input_ids=ids).logits
    assert float((mine - other).norm() / other.norm()) < 1e-6
    # The folder alone is the model that it names, with it.
    again = AutoModelForCausalLM.from_pretrained(result.path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, mine)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "copy"])
def test_preferences_reach_pairs_that_were_held_back(
    base: Path, adapted: bool, tmp_path: Path
) -> None:
    """Against the model without its adapter, or against a copy of it as it was."""
    tables: dict[str, Any] = {
        "model": {"from": str(base)},
        "data": {
            "sources": [{"paths": [preferences(tmp_path / "pairs.jsonl", PAIRS)]}],
            "context": 64,
            "batch_rows": 4,
        },
        "objective": {"kind": "preference", "beta": 0.5},
        "optimizer": {"learning_rate": 0.005, "weight_decay": 0.0},
        "train": {"steps": 12, "parts": 2},
    }
    if adapted:
        tables["adapter"] = {}
    result, told = ran(tables, tmp_path)
    first, *_, last = told.steps
    assert first.terms["preference"] == pytest.approx(0.6931, abs=1e-3)
    assert abs(first.terms["reward_margin"]) < 1e-3
    assert last.terms["reward_margin"] > 1
    assert last.terms["reward_accuracy"] == 1

    config = build(TrainingConfig, {**tables, "train": {"steps": 1}})
    source = {"paths": (preferences(tmp_path / "held.jsonl", HELD_PAIRS),)}
    source = dataclasses.replace(config.data.sources[0], **source)
    settings = dataclasses.replace(config.data, sources=(source,), cache=str(tmp_path / "cache"))
    data = build_data(settings, result.tokenizer, vocab_size=result.model.config.vocab_size)
    reference = AutoModelForCausalLM.from_pretrained(base)
    objective, start = Preference(0.5, reference=reference), Progress(0, 0, 0.0)
    (batch,) = data.parts(start)
    with torch.no_grad():
        terms = objective.terms(result.model, batch, start)
    assert float(terms["reward_margin"].sum) > terms["reward_margin"].count
    assert float(terms["reward_accuracy"].sum) == terms["reward_accuracy"].count
