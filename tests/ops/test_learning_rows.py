"""What keeps its inputs alone: outputs and gradients are those of the formulas."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.ops.activations import silu_gate
from quintet.ops.experts_learning import learning_experts
from quintet.ops.moe import looped_experts
from quintet.ops.norm import rms_norm
from support import relative_error


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-6)


def norm_by_formula(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def gate_by_formula(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]]
CASES = {
    "norm": (norm, norm_by_formula, ((3, 5, 33), (33,))),
    "norm of one": (norm, norm_by_formula, ((1, 64), (64,))),
    "gate": (silu_gate, gate_by_formula, ((4, 7, 19), (4, 7, 19))),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def all_of(out: Tensor, given: list[Tensor], along: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, given, along)]


@cases
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_gradients_are_those_of_the_formula(
    case: tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]],
    dtype: torch.dtype,
    bound: float,
) -> None:
    function, formula, shapes = case
    given = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in given]
    made, wanted = function(*given), formula(*exact)
    along = torch.randn_like(made)
    pairs = zip(all_of(made, given, along), all_of(wanted, exact, along.double()), strict=True)
    assert max(relative_error(a.double(), b) for a, b in pairs) < bound


@cases
def test_a_gradient_of_the_gradient_is_the_formulas(
    case: tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]],
) -> None:
    function, formula, shapes = case
    given = [torch.randn(shape).requires_grad_() for shape in shapes]
    seconds = []
    for out in (function(*given), formula(*given)):
        (first,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), given))
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def experts(
    dtype: torch.dtype = torch.float32, C: int = 12, inner: int = 7
) -> tuple[Tensor, list[Tensor]]:
    N, A, E = 9, 2, 5
    # Nobody goes to the last one.
    indices = torch.stack([torch.randperm(E - 1)[:A] for _ in range(N)])
    shapes = ((N, A), (N, C), (E, 2 * inner, C), (E, C, inner))
    return indices, [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def looped(indices: Tensor, given: list[Tensor]) -> Tensor:
    weights, x, gate_up, down = given
    return looped_experts(x, indices, weights, gate_up, down, F.silu)


def learning(indices: Tensor, given: list[Tensor]) -> Tensor:
    weights, x, gate_up, down = given
    return learning_experts(x, indices, weights, gate_up, down)


def test_experts_learn_what_the_loop_over_them_does() -> None:
    indices, given = experts()
    exact = [x.detach().double().requires_grad_() for x in given]
    made, wanted = learning(indices, given), looped(indices, exact)
    along = torch.randn_like(made)
    pairs = zip(all_of(made, given, along), all_of(wanted, exact, along.double()), strict=True)
    assert max(relative_error(a.double(), b) for a, b in pairs) < 1e-6


def test_the_gradient_of_experts_is_right_in_float64() -> None:
    # Each number is changed by itself.
    indices, given = experts(torch.float64, C=4, inner=3)
    assert torch.autograd.gradcheck(lambda *given: learning(indices, list(given)), given)
    assert torch.autograd.gradgradcheck(lambda *given: learning(indices, list(given)), given)


@pytest.mark.parametrize("frozen", range(4))
def test_experts_give_no_gradient_to_what_is_frozen(frozen: int) -> None:
    indices, given = experts()
    given[frozen] = given[frozen].detach()
    learning(indices, given).sum().backward()
    assert [x.grad is None for x in given] == [i == frozen for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_under_autocast_are_in_its_type(dtype: torch.dtype) -> None:
    indices, given = experts()
    given[1] = given[1].detach().to(dtype).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in given]
    with torch.autocast("cpu"):
        made = learning(indices, given)
    assert made.dtype == dtype
    along = torch.randn_like(made)
    found = all_of(made, given, along)
    assert [x.dtype for x in found[1:]] == [x.dtype for x in given]
    pairs = zip(found, all_of(looped(indices, exact), exact, along.double()), strict=True)
    errors = [relative_error(a.double(), b) for a, b in pairs]
    # Products were rounded to bfloat16, and no more than that.
    assert 1e-4 < max(errors) < 0.02
