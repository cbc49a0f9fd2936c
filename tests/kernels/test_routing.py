import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels.routing import Rules, choose, router_logits
from quintet.ops.moe import _top_experts, top_experts
from quintet.ops.routing import (
    RoutingRules,
    _sigmoid_routing,
    _softmax_routing,
    sigmoid_routing,
    sigmoid_rules,
    softmax_routing,
    softmax_rules,
)

Chosen = tuple[Tensor, Tensor]

EXAMPLES = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EXAMPLES
@given(N=st.integers(1, 32), E=st.integers(1, 40), C=st.integers(1, 300), threads=st.integers(1, 3))
def test_logits_are_sums_in_float32(
    level: str, dtype: torch.dtype, N: int, E: int, C: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    x, weight = torch.randn(N, C + 3).to(dtype)[:, 3:], torch.randn(E, C).to(dtype)
    made = router_logits(x, weight)
    assert made is not None
    assert made.dtype == torch.float32
    # Of bfloat16 too nothing is rounded but the sums: a product of two is exact.
    # Where a sum cancels, the rounding of its terms is left.
    error = (made.double() - x.double() @ weight.double().T).abs()
    assert bool((error <= 1e-6 * (x.double().abs() @ weight.double().abs().T)).all())


def same(made: Chosen | None, expected: Chosen, E: int) -> None:
    """Hold one choice against the other: the same experts, each once, of the same weights."""
    assert made is not None
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
    zeros = torch.zeros(len(made[0]), E, dtype=made[1].dtype)
    hit = [zeros.scatter(1, indices, torch.ones_like(zeros)) for indices, _ in (made, expected)]
    assert torch.equal(*hit)
    dense = [zeros.scatter(1, *chosen) for chosen in (made, expected)]
    # Of exponentials there are several, a unit in the last place apart.
    torch.testing.assert_close(*dense)


@EXAMPLES
@given(data=st.data(), normalise=st.booleans(), scaling=st.sampled_from([1.0, 2.5]))
def test_the_choice_is_that_of_the_reference(
    level: str, data: st.DataObject, normalise: bool, scaling: float
) -> None:
    groups, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    kept = data.draw(st.integers(1, groups))
    active = data.draw(st.integers(1, kept * size))
    rules = RoutingRules(
        active=active, groups=groups, kept_groups=kept, normalise=normalise, scaling=scaling
    )
    N, E = data.draw(st.integers(1, 32)), groups * size
    logits, bias = 3 * torch.randn(N, E), 0.3 * torch.randn(E)
    sigmoid = choose(logits, sigmoid_rules(rules), bias)
    same(sigmoid, _sigmoid_routing(logits, bias, rules), E)
    softmax = choose(logits, softmax_rules(rules))
    same(softmax, _softmax_routing(logits, rules), E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EXAMPLES
@given(data=st.data(), N=st.integers(1, 32), E=st.integers(1, 70), normalise=st.booleans())
def test_shares_are_rounded_as_the_logits_are_and_come_in_the_order_of_the_reference(
    level: str, dtype: torch.dtype, data: st.DataObject, N: int, E: int, normalise: bool
) -> None:
    A = data.draw(st.integers(1, min(E, 8)) | st.just(E))
    # Each logit once: of equal ones, torch promises nobody the first.
    logits = torch.stack([torch.randperm(E) for _ in range(N)]).to(dtype) / 16
    made = choose(logits, Rules(active=A, normalise=normalise))
    expected = _top_experts(logits, A, normalise=normalise)
    assert made is not None
    assert torch.equal(made[0], expected[0])
    # An exponential's last place may carry a share over to the next of dtype's numbers.
    torch.testing.assert_close(made[1], expected[1])
    assert (made[1] == expected[1]).double().mean() >= 0.9 or dtype == torch.float32


def test_of_equals_the_first_are_chosen_and_count_alike(level: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 2.0]])
    for sigmoid in (False, True):
        rules = Rules(sigmoid=sigmoid, active=4, ranked=2, normalise=True)
        made = choose(logits, rules)
        assert made is not None
        assert made[0].tolist() == [[1, 3, 5, 0]]
        values = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
        expected = values.topk(4).values
        torch.testing.assert_close(made[1], expected / expected.sum())
    grouped = choose(logits, Rules(active=2, groups=3, kept_groups=1))
    assert grouped is not None
    assert grouped[0].tolist() == [[1, 0]]


def test_what_is_no_number_is_chosen_like_in_torch_and_ends_nothing(level: str) -> None:
    logits = torch.tensor(
        [[0.0, torch.nan, 2.0, 1.0], [torch.nan] * 4, [torch.inf, -torch.inf, 0, 1]]
    )
    rules = RoutingRules(active=2, groups=2, kept_groups=1, normalise=True)
    made = choose(logits, sigmoid_rules(rules), torch.zeros(4))
    assert made is not None
    assert set(made[0][0].tolist()) == {0, 1}
    assert made[0].min() >= 0
    assert made[0].max() < 4
    # A softmax with one is NaN all over.
    made = choose(logits, softmax_rules(rules))
    assert made is not None
    assert bool(made[1].isnan().all())
    assert bool(_softmax_routing(logits, rules)[1].isnan().all())
    assert all(len(set(row)) == 2 and set(row) <= set(range(4)) for row in made[0].tolist())
    masked = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    made = choose(masked, Rules(active=3))
    assert made is not None
    assert made[0].tolist() == [[0, 2, 1]]
    torch.testing.assert_close(made[1], masked.softmax(dim=-1).topk(3).values)


def test_routers_use_it_where_nothing_learns(level: str) -> None:
    rules = RoutingRules(active=2, groups=2, kept_groups=1, normalise=True, scaling=2.5)
    logits, bias = torch.randn(5, 8), torch.randn(8)
    for made, expected in (
        (softmax_routing(logits, rules), choose(logits, softmax_rules(rules))),
        (sigmoid_routing(logits, bias, rules), choose(logits, sigmoid_rules(rules), bias)),
        (top_experts(logits, 3, normalise=False), choose(logits, Rules(active=3))),
    ):
        assert expected is not None
        assert all(map(torch.equal, made, expected))
    logits.requires_grad_()
    for _, weights in (
        softmax_routing(logits, rules),
        sigmoid_routing(logits, bias, rules),
        top_experts(logits, 3, normalise=True),
    ):
        assert weights.requires_grad


def test_other_dtypes_and_what_learns_are_left_to_torch(level: str) -> None:
    x, weight = torch.randn(33, 8), torch.randn(4, 8)
    assert router_logits(x, weight) is not None
    assert router_logits(x[:2], weight.bfloat16()) is None
    assert router_logits(x[:2], weight.requires_grad_()) is None
    logits, rules = torch.randn(33, 8), Rules(active=2)
    assert choose(logits, rules) is not None
    assert choose(logits[:2].double(), rules) is None
    assert choose(logits[:2].T, rules) is None
    assert choose(logits[:2].clone().requires_grad_(), rules) is None


@pytest.mark.parametrize(
    "rules",
    [
        Rules(active=9),
        Rules(active=0),
        Rules(active=1, groups=3),
        Rules(active=3, groups=4, kept_groups=1),
        Rules(active=1, groups=2, kept_groups=3),
    ],
    ids=str,
)
def test_more_experts_than_there_are_cannot_be_had(level: str, rules: Rules) -> None:
    assert choose(torch.randn(2, 8), rules) is None


@pytest.mark.parametrize("bias", [torch.zeros(7), torch.zeros(8).double(), torch.zeros(16)[::2]])
def test_a_bias_has_to_be_one_of_each_expert(level: str, bias: Tensor) -> None:
    assert choose(torch.randn(2, 8), Rules(active=2), bias) is None
