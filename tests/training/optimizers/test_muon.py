"""Muon, beside PyTorch's and beside its definition."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quintet.training.optimizers import muon
from quintet.training.optimizers.muon import Muon
from quintet.training.optimizers.orthogonal import orthogonal, quick_dtype

SHAPES = [(12, 20), (20, 12), (16, 16), (1, 8)]


def gradients(shapes: list[tuple[int, ...]], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def trained(
    optimizer: torch.optim.Optimizer, params: list[Tensor], made: Iterator[list[Tensor | None]]
) -> None:
    for each in made:
        for p, gradient in zip(params, each, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        optimizer.step()


def reference(x: Tensor) -> Tensor:
    """The steps of Newton and Schulz on one matrix, in float64."""
    if x.shape[0] > x.shape[1]:
        return reference(x.T).T
    x = x.double() / x.double().norm()
    for _ in range(5):
        S = x @ x.T
        x = 3.4445 * x + (-4.7750 * S + 2.0315 * S @ S) @ x
    return x


@pytest.mark.parametrize("nesterov", [True, False])
def test_it_steps_as_pytorchs_does(nesterov: bool) -> None:
    ours = [torch.nn.Parameter(p) for p in gradients(SHAPES, -1)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    one = Muon(ours, lr=0.02, weight_decay=0.1, nesterov=nesterov, dtype=torch.bfloat16)
    other = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    before = [p.detach().clone() for p in ours]
    trained(one, list(ours), (gradients(SHAPES, step) for step in range(5)))  # type: ignore[arg-type]
    trained(other, list(theirs), (gradients(SHAPES, step) for step in range(5)))  # type: ignore[arg-type]
    for p, q, was in zip(ours, theirs, before, strict=True):
        # Both round every product to eight bits, in another order.
        assert (p - q).norm() < 0.02 * (q - was).norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_steps_of_newton_and_schulz(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape)
    expected = torch.stack([reference(each) for each in x])
    exact = orthogonal(x, dtype=torch.float32).double()
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-5)
    rounded = orthogonal(x, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - expected).norm() < 0.05 * expected.norm()


def test_singular_values_become_about_one() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(4, 32, 64), dtype=torch.float32))
    assert values.min() > 0.6
    assert values.max() < 1.25


@pytest.mark.parametrize("least", [1, 2**22])
def test_a_stack_of_halves_is_as_many_matrices(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "AT_ONCE", least)
    stack = torch.nn.Parameter(torch.randn(3, 8, 6))
    other = torch.nn.Parameter(torch.randn(4, 6))
    single = [torch.nn.Parameter(m.clone()) for m in stack.detach().reshape(6, 4, 6)]
    alone = torch.nn.Parameter(other.detach().clone())
    groups = [{"params": [stack], "matrices": 2}, {"params": [other], "weight_decay": 0.0}]
    one = Muon(groups, lr=0.1, dtype=torch.float32)
    apart = Muon([{"params": single}, {"params": [alone], "weight_decay": 0.0}], lr=0.1)
    apart.dtype = torch.float32
    for step in range(3):
        stack.grad, other.grad = gradients([(3, 8, 6), (4, 6)], step)
        for p, gradient in zip(single, stack.grad.reshape(6, 4, 6), strict=True):
            p.grad = gradient.clone()
        alone.grad = other.grad.clone()
        one.step()
        apart.step()
    together = torch.stack(list(single)).reshape(3, 8, 6)
    torch.testing.assert_close(stack.detach(), together.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other, alone, rtol=1e-5, atol=1e-6)


def test_a_matrix_without_a_gradient_rests() -> None:
    stack = torch.nn.Parameter(torch.randn(3, 4, 6))
    first, last = (torch.nn.Parameter(stack.detach()[i].clone()) for i in (0, 2))
    resting = stack.detach()[1].clone()
    one = Muon([stack], lr=0.1, dtype=torch.float32)
    apart = Muon([first, last], lr=0.1, dtype=torch.float32)
    for step in range(3):
        (gradient,) = gradients([(3, 4, 6)], step)
        if step == 1:
            # Nobody chose the first expert in this step, and the second in none.
            gradient[0] = 0
        gradient[1] = 0
        stack.grad = gradient.clone()
        first.grad = None if step == 1 else gradient[0].clone()
        last.grad = gradient[2].clone()
        one.step()
        apart.step()
    assert torch.equal(stack.detach()[1], resting)
    assert not one.state[stack]["momentum"][1].any()
    torch.testing.assert_close(stack.detach()[0], first.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stack.detach()[2], last.detach(), rtol=1e-5, atol=1e-6)


def test_updates_have_the_size_of_adamws() -> None:
    for shape in [(64, 96), (96, 64), (2, 32, 160)]:
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        Muon([p], lr=1.0).step()
        # AdamW's is between .2 and .4 in a root of mean squares (arXiv:2502.16982 §2.2).
        assert 0.15 < p.detach().square().mean().sqrt() < 0.4 * (96 / 64) ** 0.5


def test_a_closure_is_run_with_gradients() -> None:
    p = torch.nn.Parameter(torch.eye(3))

    def closure() -> float:
        loss = p.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    assert Muon([p], lr=0.1).step(closure) == 3.0
    assert p[0, 0] < 1


def test_what_is_quick_is_known_of_every_device() -> None:
    assert quick_dtype(torch.device("cuda")) == torch.bfloat16
    assert quick_dtype(torch.device("mps")) == torch.float32
    assert quick_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)
