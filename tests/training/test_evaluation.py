"""Looking at a model while it is trained: what is measured, and that nothing else changes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet import AutoModelForCausalLM, AutoTokenizer
from quintet.errors import ConfigError, InputError
from quintet.modeling.balance import BiasBalancer
from quintet.training.data import Document
from quintet.training.evaluation import EvaluationSettings, evaluate, samples
from quintet.training.loop import train
from tiny import build
from trainings import Heard, material, settings


def documents(count: int, length: int = 20) -> list[Document]:
    found = []
    for number in range(count):
        ids = torch.randint(12, (length,), generator=torch.Generator().manual_seed(number))
        labels = ids.clone()
        labels[0] = -100
        found.append(Document(input_ids=ids, labels=labels, bytes=30, name=str(number)))
    return found


def test_what_is_measured(predicting: Any) -> None:
    found = evaluate(predicting, documents(3), 8, step=7, tokens=70)
    assert (found.step, found.tokens, found.scored) == (7, 70, 57)
    assert found.bits_per_byte == pytest.approx(found.bits_per_token * 57 / 90)
    assert found.perplexity == pytest.approx(2**found.bits_per_token)
    assert found.score == found.bits_per_byte
    # An untrained model knows hardly more than how many ids there are.
    assert abs(found.bits_per_token - math.log2(12)) < 1
    assert found.agreement is not None
    assert set(found.balance) == {"model.layers.1.mlp.gate", "model.layers.2.mlp.gate"}
    assert all(0 <= violation <= 1 for violation in found.balance.values())


def test_modes_and_randomness_are_as_they_were(predicting: Any) -> None:
    predicting.train()
    predicting.model.layers[0].eval()
    modes = [module.training for module in predicting.modules()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with BiasBalancer(predicting) as balancer:
        evaluate(predicting, documents(1))
        assert not balancer.violations()
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in predicting.modules()] == modes
    assert all(p.grad is None for p in predicting.parameters())


def test_samples_follow_their_own_seed_alone(tmp_path: Any) -> None:
    root = build(tmp_path)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(root),
        AutoTokenizer.from_pretrained(root),
    )
    model.train()
    settings = EvaluationSettings(prompts=("Hello", "The quick"), max_new_tokens=5, seed=3)
    before = torch.get_rng_state()
    first = list(samples(model, tokenizer, settings, step=4))
    torch.rand(1)
    torch.manual_seed(9)
    assert list(samples(model, tokenizer, settings, step=4)) == first
    torch.set_rng_state(before)
    assert model.training
    assert [(s.prompt, s.step, s.seed) for s in first] == [("Hello", 4, 3), ("The quick", 4, 3)]
    other = EvaluationSettings(prompts=("Hello",), max_new_tokens=5, temperature=0)
    text = next(samples(model, tokenizer, other)).text
    inputs = tokenizer("Hello", return_tensors="pt")
    greedy = model.eval().generate(inputs, max_new_tokens=5, do_sample=False)
    assert text == tokenizer.decode(greedy[0, inputs["input_ids"].shape[1] :])


def test_what_is_asked_is_asked_by_the_template(tmp_path: Path) -> None:
    root = build(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(root)
    tokenizer = AutoTokenizer.from_pretrained(root)
    settings = EvaluationSettings(prompts=("Hello",), chat=True, max_new_tokens=4, temperature=0)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(asked, max_new_tokens=4, do_sample=False)
    text = tokenizer.decode(answer[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert next(samples(model, tokenizer, settings)).text == text


def test_documents_are_spread_over_all() -> None:
    settings = EvaluationSettings(documents=3)
    assert [document.name for document in settings.chosen(documents(9, 2))] == ["0", "3", "6"]
    assert len(settings.chosen(documents(2, 2))) == 2


def test_when_one_looks() -> None:
    assert [step for step in range(1, 10) if EvaluationSettings(every=4).is_due(step)] == [4, 8]
    assert not any(EvaluationSettings().is_due(step) for step in range(5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("every", -1), ("documents", 0), ("context", 1), ("max_new_tokens", 0)),
        *(("temperature", -0.1), ("temperature", math.nan), ("seed", -1), ("seed", 2**63)),
    ],
)
def test_settings_that_mean_nothing(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} = {value}: "):
        EvaluationSettings(**{name: value})


def test_nothing_to_predict_is_said(predicting: Any) -> None:
    with pytest.raises(InputError, match="0 held-out documents have no token to predict"):
        evaluate(predicting, [])


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen2"])
def test_a_training_is_the_same_to_the_bit_whether_one_looks_or_not(
    kind: str, tmp_path: Path
) -> None:
    root = material(tmp_path)
    tables: dict[str, Any] = {"train": {"steps": 4}}
    if kind == "deepseek_v3":
        tables |= {"balance": {"bias": 0.1}, "objective": {"prediction": 0.3}}
    held = {"held_out_sources": [{"paths": [str(root / "held.txt")]}]}
    looks = {"every": 1, "prompts": ("Hello",), "max_new_tokens": 3}
    heard = Heard()
    first = train(settings(root, tmp_path / "without", kind, **tables))
    second = train(
        settings(root, tmp_path / "with", kind, **tables, data=held, evaluation=looks),
        report=heard,
    )
    assert len(heard.evaluations) == len(heard.samples) == 4
    weights = second.model.state_dict()
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
