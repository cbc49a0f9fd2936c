import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quintet.kernels.routing import router_logits, sigmoid_routing
from quintet.ops.routing import RoutingRules, _sigmoid_routing

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
    made = sigmoid_routing(
        logits,
        bias,
        active=active,
        groups=groups,
        kept_groups=kept,
        normalise=normalise,
        scaling=scaling,
    )
    assert made is not None
    indices, weights = _sigmoid_routing(logits, bias, rules)
    expected = torch.zeros(N, E).scatter(1, indices, weights)
    torch.testing.assert_close(torch.zeros(N, E).scatter(1, *made), expected)
    assert all(len(set(row)) == active for row in made[0].tolist())


def test_what_is_no_number_is_chosen_like_in_torch_and_ends_nothing(level: str) -> None:
    logits = torch.tensor(
        [[0.0, torch.nan, 2.0, 1.0], [torch.nan] * 4, [torch.inf, -torch.inf, 0, 1]]
    )
    made = sigmoid_routing(
        logits, torch.zeros(4), active=2, groups=2, kept_groups=1, normalise=True, scaling=1.0
    )
    assert made is not None
    assert set(made[0][0].tolist()) == {0, 1}
    assert made[0].min() >= 0
    assert made[0].max() < 4


def test_many_tokens_and_what_learns_are_left_to_torch(level: str) -> None:
    x, weight = torch.randn(33, 8), torch.randn(4, 8)
    assert router_logits(x, weight) is None
    assert router_logits(x[:2], weight.bfloat16()) is None
    assert router_logits(x[:2], weight.requires_grad_()) is None
