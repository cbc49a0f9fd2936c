"""Attention that learns, against the formula and its gradient, text by text."""

import pytest
import torch
from torch import Tensor

from quintet.kernels.native import available
from quintet.ops.attention import eager, sdpa
from quintet.ops.causal_learning import attend_learning, attends_learning
from quintet.ops.masks import AttentionMask
from support import relative_error

pytestmark = pytest.mark.skipif(not available(), reason="there are no kernels")
SEEN = AttentionMask(None, True, 0, None)


def drawn(B: int, H: int, K: int, T: int, D: int, V: int) -> list[Tensor]:
    return [torch.randn(B, n, T, size).requires_grad_() for n, size in ((H, D), (K, D), (K, V))]


def by_text(given: list[Tensor], lengths: list[int]) -> Tensor:
    """Apply the definition to each text of the rows, as if it were alone."""
    B, _, T, _ = given[0].shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in given]
    texts = zip(*(x.split(lengths) for x in flat), strict=True)
    outs = [
        eager(*(x.transpose(0, 1)[None] for x in text), SEEN, scale=0.3, dropout=0.0)[0][0]
        for text in texts
    ]
    return torch.cat(outs, dim=1).unflatten(1, (B, T)).transpose(0, 1)


def all_of(out: Tensor, given: list[Tensor], along: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, given, along)]


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ((1, 1, 1, 1, 16, 16), [1]),
        ((2, 4, 2, 70, 32, 48), [70, 70]),
        ((2, 3, 1, 100, 48, 16), [1, 64, 65, 3, 67]),
        ((1, 2, 2, 200, 96, 80), [130, 70]),
    ],
)
def test_output_and_gradients_are_the_formulas(
    sizes: tuple[int, int, int, int, int, int], lengths: list[int]
) -> None:
    given = drawn(*sizes)
    assert attends_learning(*given)
    exact = [x.detach().double().requires_grad_() for x in given]
    made = attend_learning(*given, 0.3, lengths)
    along = torch.randn_like(made)
    pairs = zip(
        all_of(made, given, along),
        all_of(by_text(exact, lengths), exact, along.double()),
        strict=True,
    )
    assert max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs) < 1e-6


@pytest.mark.parametrize("autocast", [True, False])
def test_narrow_numbers_are_rounded_once(autocast: bool) -> None:
    low = [x.detach().bfloat16() for x in drawn(1, 4, 2, 70, 16, 32)]
    given = [(x.float() if autocast else x).requires_grad_() for x in low]
    exact = [x.detach().double().requires_grad_() for x in low]
    with torch.autocast("cpu", enabled=autocast):
        made, _ = sdpa(*given, SEEN, scale=0.3, dropout=0.0)
    assert made.dtype == torch.bfloat16
    along = torch.randn_like(made)
    found = all_of(made, given, along)
    assert [x.dtype for x in found[1:]] == [x.dtype for x in given]
    wanted = all_of(by_text(exact, [70]), exact, along.double())
    assert max(relative_error(a.double(), b) for a, b in zip(found, wanted, strict=True)) < 0.01


def test_a_gradient_of_the_gradient_goes_through_the_formula() -> None:
    given = drawn(1, 2, 1, 9, 16, 16)
    seconds = []
    for out in (attend_learning(*given, 0.3), by_text(given, [9])):
        (first,) = torch.autograd.grad(out.square().sum(), given[1], create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), given))
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_scores_of_any_size_leave_finite_gradients() -> None:
    given = [(x.detach() * 100).requires_grad_() for x in drawn(1, 1, 1, 80, 16, 16)]
    made = attend_learning(*given, 1.0)
    assert all(x.isfinite().all() for x in all_of(made, given, torch.ones_like(made)))


def test_it_gives_way_where_nothing_learns_or_sizes_do_not_suit() -> None:
    given = drawn(1, 1, 1, 4, 16, 16)
    with torch.no_grad():
        assert not attends_learning(*given)
    assert not attends_learning(*(x.detach() for x in given))
    assert not attends_learning(*(x.double() for x in given))
    assert not attends_learning(*drawn(1, 1, 1, 4, 8, 16))
