"""DeepSeek's routers and balance loss against plain loops over the formulas of the papers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops.routing import (
    RoutingRules,
    balance_loss,
    balanced_bias,
    expert_load,
    max_violation,
    sigmoid_routing,
    softmax_routing,
)
from support import relative_error


@st.composite
def rules(draw: st.DrawFn) -> tuple[int, RoutingRules]:
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    return groups * size, RoutingRules(
        active=draw(st.integers(1, kept * size)),
        groups=groups,
        kept_groups=kept,
        normalise=draw(st.booleans()),
        scaling=draw(st.sampled_from([1.0, 2.5])),
    )


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def chosen_by_loop(choice: list[float], how: RoutingRules, top: int) -> list[int]:
    size = len(choice) // how.groups
    groups = [choice[g * size : (g + 1) * size] for g in range(how.groups)]
    totals = [sum(sorted(group, reverse=True)[:top]) for group in groups]
    open_experts = [g * size + i for g in best(totals, how.kept_groups) for i in range(size)]
    return best([choice[e] if e in open_experts else -1e9 for e in range(len(choice))], how.active)


def dense(indices: Tensor, weights: Tensor, E: int) -> Tensor:
    return torch.zeros(len(indices), E).scatter(1, indices, weights)


@settings(max_examples=60, deadline=None)
@given(case=rules(), seed=st.integers(0, 2**30))
def test_softmax_routing_follows_the_paper(case: tuple[int, RoutingRules], seed: int) -> None:
    E, how = case
    logits = torch.randn(5, E, generator=torch.Generator().manual_seed(seed)) * 2
    expected = torch.zeros(5, E)
    for n, scores in enumerate(logits.softmax(dim=-1).tolist()):
        experts = chosen_by_loop(scores, how, top=1)
        total = sum(scores[e] for e in experts)
        for e in experts:
            normal = how.normalise and how.active > 1
            expected[n, e] = scores[e] / total if normal else scores[e] * how.scaling
    assert relative_error(dense(*softmax_routing(logits, how), E), expected) < 1e-5


@settings(max_examples=60, deadline=None)
@given(case=rules(), seed=st.integers(0, 2**30))
def test_sigmoid_routing_chooses_with_the_bias_and_weighs_without(
    case: tuple[int, RoutingRules], seed: int
) -> None:
    E, how = case
    generator = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(5, E, generator=generator), torch.randn(E, generator=generator)
    expected = torch.zeros(5, E)
    for n, scores in enumerate(logits.sigmoid().tolist()):
        biased = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        experts = chosen_by_loop(biased, how, top=2)
        total = sum(scores[e] for e in experts) if how.normalise else 1.0
        for e in experts:
            expected[n, e] = scores[e] / total * how.scaling
    assert relative_error(dense(*sigmoid_routing(logits, bias, how), E), expected) < 1e-5


def test_negative_biases_do_not_open_closed_groups() -> None:
    """A closed group counts as -inf: as 0 it would beat open experts of negative biased score."""
    bias = torch.tensor([-3.0, -3.0, -9.0, -9.0])
    how = RoutingRules(active=2, groups=2, kept_groups=1)
    indices, _ = sigmoid_routing(torch.zeros(1, 4), bias, how)
    assert sorted(indices[0].tolist()) == [0, 1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**30), per_row=st.booleans())
def test_balance_loss_follows_the_paper_and_ignores_padding(seed: int, per_row: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    B, T, E, A = 3, 6, 5, 2
    scores = torch.randn(B, T, E, generator=generator).softmax(dim=-1)
    indices = scores.topk(A, dim=-1).indices
    mask = (torch.rand(B, T, generator=generator) < 0.6).long()
    mask[0, 0] = 1
    rows = [[(b, t) for t in range(T) if mask[b, t]] for b in range(B)]
    if not per_row:
        rows = [[place for row in rows for place in row]]
    losses = []
    for row in filter(None, rows):
        loss = 0.0
        for e in range(E):
            f = E / (A * len(row)) * sum(e in indices[place].tolist() for place in row)
            loss += f * sum(float(scores[place][e]) for place in row) / len(row)
        losses.append(loss)
    made = balance_loss(scores, indices, mask, per_row=per_row)
    assert abs(float(made) - sum(losses) / len(losses)) < 1e-5


def test_balanced_experts_have_the_least_loss() -> None:
    even = torch.full((1, 4, 4), 0.25)
    indices = torch.tensor([[[0], [1], [2], [3]]])
    mask = torch.ones(1, 4)
    assert float(balance_loss(even, indices, mask, per_row=True)) == 1.0
    lopsided = torch.tensor([0.97, 0.01, 0.01, 0.01]).expand(1, 4, 4)
    assert float(balance_loss(lopsided, indices * 0, mask, per_row=True)) > 3.8
    assert float(balance_loss(even, indices, mask * 0, per_row=True)) == 0.0


def test_a_bias_moves_against_the_load() -> None:
    indices = torch.tensor([[0, 1], [0, 2], [0, 1]])
    load = expert_load(indices, 4)
    assert load.tolist() == [3, 2, 1, 0]
    bias = balanced_bias(torch.zeros(4), load, 0.01)
    torch.testing.assert_close(bias, torch.tensor([-0.01, -0.01, 0.01, 0.01]))
    assert max_violation(load) == pytest.approx(1.0)
    assert max_violation(torch.tensor([2, 2, 2])) == 0.0
    assert max_violation(torch.zeros(3)) == 0.0
    even = balanced_bias(torch.zeros(2), torch.tensor([5, 5]), 0.01)
    assert not even.any()
