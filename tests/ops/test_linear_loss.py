"""What losses read of logits is the same without the logits, and so are all gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops import linear_loss
from quintet.ops.linear_loss import linear_sums, logit_sums
from support import relative_error

TOLERANCE = 1e-6


@pytest.fixture(autouse=True, params=[(40, 4), (1 << 20, 1 << 10)], ids=["tiles", "one tile"])
def tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(linear_loss, "TILE", {"cpu": request.param})


def operands(
    N: int = 11, V: int = 37, C: int = 6, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    hidden, weight = torch.randn(N, C, dtype=dtype), torch.randn(V, C, dtype=dtype)
    tensors = [hidden, weight, *([torch.randn(V, dtype=dtype)] if bias else [])]
    for tensor in tensors:
        tensor.requires_grad_()
    return hidden, weight, tensors[2] if bias else None, torch.randint(V, (N,))


def definition(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Any, *, mean: bool) -> Any:
    return logit_sums(F.linear(hidden, weight, bias), ids, mean=mean)


def results(compute: Any, tensors: Any, *, mean: bool = False) -> list[Tensor]:
    """The numbers, and the gradients of a loss that weighs each of them otherwise."""
    hidden, weight, bias, ids = tensors
    found = [x for x in compute(hidden, weight, ids, bias, mean=mean) if x is not None]
    generator = torch.Generator().manual_seed(3)
    loss = sum((x * torch.randn(len(ids), generator=generator)).sum() for x in found)
    learning = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    return [*found, *torch.autograd.grad(loss, learning)]


def alike(ours: list[Tensor], theirs: list[Tensor], tolerance: float = TOLERANCE) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(relative_error(a, b) < tolerance and a.dtype == b.dtype for a, b in pairs)


@settings(deadline=None, max_examples=30)
@given(
    N=st.integers(1, 14),
    V=st.integers(1, 50),
    C=st.integers(1, 9),
    bias=st.booleans(),
    mean=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_numbers_and_gradients_are_those_of_the_definition(
    N: int, V: int, C: int, bias: bool, mean: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = operands(N, V, C, bias=bias)
    ours = results(linear_sums, tensors, mean=mean)
    # Sums that nearly cancel are as exact as what they are made of.
    for a, b in zip(ours, results(definition, tensors, mean=mean), strict=True):
        assert (a - b).abs().max() <= 3e-6 * max(1, b.abs().max())


def test_a_likely_token_has_a_loss_as_exact_as_an_unlikely_one() -> None:
    hidden = torch.full((1, 1), 30.0)
    weight = torch.tensor([[1.0], [0.8], [0.0]])
    (loss,) = -linear_sums(hidden, weight, torch.zeros(1, dtype=torch.long)).log_prob
    exact = torch.log1p(torch.tensor([-6.0, -30.0]).double().exp().sum())
    assert abs(loss.item() - exact.item()) < 1e-4 * exact.item()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_does_not_learn_gets_no_gradient(frozen: str) -> None:
    tensors = operands(bias=True)
    dict(zip(("hidden", "weight", "bias"), tensors, strict=False))[frozen].requires_grad_(False)
    assert alike(results(linear_sums, tensors), results(definition, tensors))


def test_narrow_numbers_are_as_near_as_whole_logits_of_them() -> None:
    tensors = operands(64, 200, 16, dtype=torch.bfloat16)
    exact = results(
        definition,
        (*(x.detach().float().requires_grad_() for x in tensors[:2]), None, tensors[3]),
    )
    ours, plain = results(linear_sums, tensors), results(definition, tensors)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a.float(), truth) < 1.5 * relative_error(b.float(), truth) + 2**-8


@pytest.mark.parametrize("both_ways", [False, True])
def test_autocast_rounds_what_it_rounds_elsewhere(both_ways: bool) -> None:
    tensors = operands(bias=True)

    def run(compute: Any) -> list[Tensor]:
        hidden, weight, bias, ids = tensors
        with torch.autocast("cpu", torch.bfloat16):
            loss = -compute(hidden, weight, ids, bias, mean=False).log_prob.sum()
            if both_ways:
                return [loss, *torch.autograd.grad(loss, (hidden, weight, bias))]
        return [loss, *torch.autograd.grad(loss, (hidden, weight, bias))]

    ours, plain = run(linear_sums), run(definition)
    assert relative_error(ours[0], plain[0]) < TOLERANCE
    assert alike(ours, plain, 2**-7)


def test_thousands_of_unlikely_ids_are_not_lost_beside_the_likely_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_loss, "TILE", {"cpu": (1 << 14, 4)})
    hidden, weight = torch.randn(4, 16).requires_grad_(), torch.randn(60_000, 16) * 0.03
    ids = torch.randint(60_000, (4,))
    exact = hidden.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad(linear_sums(hidden, weight, ids).log_prob.sum(), hidden)
    log_prob = (exact @ weight.double().T).log_softmax(-1).gather(-1, ids[:, None])
    (truth,) = torch.autograd.grad(log_prob.sum(), exact)
    assert relative_error(ours, truth.float()) < 3e-7


def test_a_gradient_can_be_derived() -> None:
    tensors = operands(bias=True)

    def curvature(compute: Any) -> list[Tensor]:
        hidden, weight, bias, ids = tensors
        sums = compute(hidden, weight, ids, bias, mean=True)
        loss = sums.log_prob.sum() + sums.log_sum.square().sum() + sums.mean.sum()
        (slope,) = torch.autograd.grad(loss, hidden, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), (hidden, weight, bias)))

    assert alike(curvature(linear_sums), curvature(definition))


def test_a_second_way_back_is_as_the_first() -> None:
    hidden, weight, _, ids = operands()
    loss = linear_sums(hidden, weight, ids).log_prob.sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(loss, weight))


def test_no_tokens_have_gradients_of_zero() -> None:
    hidden, weight, bias, ids = operands(0, bias=True)
    sums = linear_sums(hidden, weight, ids, bias, mean=True)
    sums.log_prob.sum().backward()
    assert all(x is not None and x.shape == (0,) for x in sums)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_functions_of_functions_and_recorded_programs_take_the_definition() -> None:
    hidden, weight, _, ids = operands()

    def loss(weight: Tensor) -> Tensor:
        return linear_sums(hidden, weight, ids).log_prob.sum()

    (expected,) = torch.autograd.grad(loss(weight), weight)
    assert relative_error(torch.func.grad(loss)(weight), expected) < TOLERANCE
    several = torch.vmap(loss)(torch.stack([weight, weight]))
    assert relative_error(several, loss(weight).expand(2)) < TOLERANCE
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert relative_error(torch.autograd.grad(compiled(weight), weight)[0], expected) < TOLERANCE
