"""A teacher's predictions are learned, for a few tokens at a time."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from conformance.families import FAMILIES, Family, each
from conformance.heads import made
from quintet.errors import ConfigError, InputError
from quintet.training.batch import Batch
from quintet.training.objectives import Distillation, distillation, token_logprobs
from quintet.training.progress import Progress
from support import relative_error

START = Progress(step=0, tokens=0, done=0.0)


def batch() -> Batch:
    ids = torch.randint(1, 100, (2, 8), generator=torch.Generator().manual_seed(2))
    return Batch(input_ids=ids, labels=ids.masked_fill(ids % 4 == 0, -100))


@each
def test_what_a_teacher_predicts_is_learned(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "AT_ONCE", 3 * 101)
    student, teacher = (made(family, "ForCausalLM") for _ in range(2))
    for p in teacher.parameters():
        p.data += 0.02 * torch.randn_like(p)
    objective, text = Distillation(teacher, temperature=2.0, share=0.7), batch()
    terms, counts = objective.terms(student, text, START), objective.counts(text)
    assert {name: term.count for name, term in terms.items()} == counts
    loss = sum((t.weight * t.sum / t.count for t in terms.values()), torch.zeros(()))
    loss.backward()
    ours = [p.grad for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    labels = text.labels[:, 1:].flatten()
    z, t = (m(text.input_ids).logits[:, :-1].flatten(0, 1) for m in (student, teacher))
    z, t, labels = z[labels != -100], t[labels != -100].detach(), labels[labels != -100]
    q, log_p = (t / 2).softmax(-1), (z / 2).log_softmax(-1)
    apart = (q * (q.log() - log_p)).sum(-1).mean() * 4
    expected = 0.7 * apart + 0.3 * F.cross_entropy(z, labels)
    expected.backward()
    assert relative_error(loss, expected) < 1e-5
    largest = max(float(g.abs().max()) for g in ours)
    theirs = [p.grad for p in student.parameters() if p.grad is not None]
    assert all((a - b).abs().max() < 1e-5 * largest for a, b in zip(ours, theirs, strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_a_batch_that_teaches_nothing_is_0() -> None:
    model = made(FAMILIES[0], "ForCausalLM")
    ids = torch.randint(1, 100, (1, 4))
    empty = Batch(input_ids=ids, labels=torch.full_like(ids, -100))
    term = Distillation(model).terms(model, empty, START)["distillation"]
    assert term.sum == term.count == 0
    term.sum.backward()


def test_models_and_numbers_that_do_not_fit_are_named() -> None:
    student = made(FAMILIES[0], "ForCausalLM")
    other = made(FAMILIES[0], "ForCausalLM", vocab_size=64)
    with pytest.raises(InputError, match="and the teacher 64"):
        Distillation(other).terms(student, batch(), START)
    for options, named in (({"temperature": 0.0}, "temperature=0"), ({"share": 0.0}, "share=0")):
        with pytest.raises(ConfigError, match=named):
            Distillation(other, **options)  # type: ignore[arg-type]


def test_log_probabilities_of_tokens_have_gradients() -> None:
    head: Any = torch.nn.Linear(6, 20)
    states = torch.randn(2, 5, 6, requires_grad=True)
    ids = torch.randint(20, (2, 5)).masked_fill(torch.tensor([[1, 0, 0, 0, 1]]).bool(), -100)
    found = token_logprobs(states, head, ids)
    plain = head(states).log_softmax(-1).gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    plain = torch.where(ids == -100, 0, plain)
    assert relative_error(found, plain) < 1e-6
    ours, theirs = (torch.autograd.grad(x.square().sum(), states)[0] for x in (found, plain))
    assert relative_error(ours, theirs) < 1e-6
