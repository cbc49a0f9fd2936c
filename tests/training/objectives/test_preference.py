"""Preferences are learned as their papers say, against a model or against none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from conformance.families import FAMILIES
from conformance.heads import made
from quintet import LoraConfig
from quintet.errors import ConfigError, InputError
from quintet.training.batch import Batch
from quintet.training.objectives import Preference
from quintet.training.progress import Progress
from support import relative_error

START = Progress(step=0, tokens=0, done=0.0)


def pairs() -> Batch:
    """Three questions, an answer to each, and another one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 100, (6, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 7, 8, 6, 9, 5])[:, None]).long()
    labels = ids.clone()
    labels[:, :3] = -100
    return Batch(input_ids=ids, labels=labels, attention_mask=mask)


def log_probs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each row, with all logits; and how many tokens count."""
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    assert batch.attention_mask is not None
    labels = batch.labels[:, 1:].masked_fill(batch.attention_mask[:, 1:] == 0, -100)
    own = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels != -100, own, 0).sum(1), (labels != -100).sum(1)


def sigmoid(apart: Tensor, lengths: Tensor) -> Tensor:
    w, l = apart.chunk(2)
    return -0.8 * F.logsigmoid(0.5 * (w - l)) - 0.2 * F.logsigmoid(-0.5 * (w - l))


def ipo(apart: Tensor, lengths: Tensor) -> Tensor:
    w, l = (apart / lengths).chunk(2)
    return (w - l - 1 / (2 * 0.5)) ** 2


KINDS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "sigmoid": ({"label_smoothing": 0.2}, sigmoid),
    "ipo": ({}, ipo),
}


@pytest.mark.parametrize("against", ["model", "itself", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_learned_as_the_papers_say(kind: str, against: str) -> None:
    options, equation = KINDS[kind]
    batch, model = pairs(), made(FAMILIES[0], "ForCausalLM").train()
    reference = made(FAMILIES[0], "ForCausalLM") if against == "model" else None
    before = torch.zeros(6)
    if against == "itself":
        before = log_probs(model, batch)[0].detach()
        model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"]))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    elif reference is not None:
        for p in reference.parameters():
            p.data += 0.05 * torch.randn_like(p)
        before = log_probs(reference, batch)[0].detach()
    objective = Preference(
        0.5, loss=kind, reference=reference, reference_free=against == "none", **options
    )
    terms = objective.terms(model, batch, START)
    terms["preference"].sum.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    own, lengths = log_probs(model, batch)
    expected = equation(own - before, lengths).sum()
    expected.backward()
    assert relative_error(terms["preference"].sum, expected) < 1e-5
    largest = max(float(g.abs().max()) for g in ours.values())
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    assert all((ours[n] - g).abs().max() < 1e-5 * largest for n, g in theirs.items())
    assert {name: term.count for name, term in terms.items()} == objective.counts(batch)
    assert reference is None or all(p.grad is None for p in reference.parameters())
    if kind == "sigmoid":
        w, l = (own - before).detach().chunk(2)
        assert relative_error(terms["reward_margin"].sum, 0.5 * (w - l).sum()) < 1e-4
        assert terms["reward_accuracy"].sum == (w > l).sum()
    assert terms["reward_margin"].weight == terms["reward_accuracy"].weight == 0


def test_adapters_are_back_after_the_reference_whatever_happens() -> None:
    batch, model = pairs(), made(FAMILIES[0], "ForCausalLM").train()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    wrong = Batch(input_ids=batch.input_ids, labels=batch.labels + 1000)
    with pytest.raises(InputError, match="labels hold"):
        Preference().terms(model, wrong, START)
    assert model.adapters.enabled
    assert model.training
    assert Preference().terms(model, batch, START)["preference"].sum.requires_grad


def test_what_are_no_pairs_is_named() -> None:
    batch, model = pairs(), made(FAMILIES[0], "ForCausalLM")
    with pytest.raises(InputError, match="none in use; give reference="):
        Preference().terms(model, batch, START)
    odd = Batch(input_ids=batch.input_ids[:3], labels=batch.labels[:3])
    with pytest.raises(InputError, match="3 rows are no pairs"):
        Preference().counts(odd)
    index = (torch.arange(9) > 4).long().expand(6, 9)
    packed = Batch(input_ids=batch.input_ids, labels=batch.labels, seq_idx=index)
    with pytest.raises(InputError, match="pairs are not packed"):
        Preference(reference_free=True).terms(model, packed, START)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": 0.0}, "beta=0"),
        ({"loss": "hinge"}, "loss='hinge'"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is of"),
    ],
)
def test_values_that_prefer_nothing_are_named(options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Preference(**options)
