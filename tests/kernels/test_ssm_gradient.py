"""The gradient of Mamba-2's mixer that keeps its inputs alone, against autograd's by steps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quintet.kernels.ssm import MixerWeights
from quintet.ops.mamba2 import mix_stepwise
from quintet.ops.mamba2_learning import mix_learning


def inputs(
    lengths: list[int], H: int, P: int, G: int, N: int, W: int, *, bias: bool = True
) -> list[Tensor | None]:
    torch.manual_seed(sum(lengths))
    C = H * P + 2 * G * N
    drawn = [
        torch.randn(sum(lengths), H * P + C + H),
        torch.randn(C, W) / 2,
        torch.randn(C) if bias else None,
        torch.randn(H),
        torch.rand(H) * 4 - 1,
        torch.randn(H),
        torch.randn(H * P),
    ]
    return [None if x is None else x.requires_grad_() for x in drawn]


def weights_of(given: list[Any], G: int) -> MixerWeights:
    return MixerWeights(*given[1:], num_groups=G, dt_limits=(0.05, 4.0), eps=1e-5)


def stepwise(given: list[Any], lengths: list[int], G: int) -> Tensor:
    made = [
        mix_stepwise(text[None], weights_of(given, G), None, None, None, chunk_size=64).out[0]
        for text in given[0].split(lengths)
    ]
    return torch.cat(made)


@pytest.mark.parametrize(
    ("lengths", "sizes", "bias"),
    [
        ([1], (2, 16, 1, 16, 4), True),
        ([70, 70], (4, 32, 2, 64, 4), True),
        ([3, 1, 65, 2, 33], (6, 16, 3, 32, 2), False),
        ([100], (3, 16, 1, 80, 4), True),
    ],
)
def test_output_and_gradients_are_those_of_the_steps(
    lengths: list[int], sizes: tuple[int, int, int, int, int], bias: bool, level: str
) -> None:
    given, G = inputs(lengths, *sizes, bias=bias), sizes[2]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    made = mix_learning(given[0], weights_of(given, G), lengths)  # type: ignore[arg-type]
    assert made is not None
    along = torch.randn_like(made)
    wanted = all_of(stepwise(exact, lengths, G), exact, along.double())
    own = off(all_of(made, given, along), wanted)
    # What float32 itself leaves of some sums over tokens is more than 1e-6 or, by luck, none.
    others = off(all_of(stepwise(given, lengths, G), given, along), wanted)
    assert all(x < max(4e-6, 2 * y) for x, y in zip(own, others, strict=True)), (own, others)


def all_of(out: Tensor, given: list[Any], along: Tensor) -> list[Tensor]:
    wanted = [x for x in given if x is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, along)]


def off(made: list[Tensor], wanted: list[Tensor]) -> list[float]:
    pairs = zip(made, wanted, strict=True)
    return [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]


def test_a_gradient_of_the_gradient_and_one_of_few_inputs_go_through_the_steps(level: str) -> None:
    lengths, sizes = [9, 4], (2, 16, 1, 16, 4)
    given = inputs(lengths, *sizes)
    seconds = []
    for out in (mix_learning(given[0], weights_of(given, 1), lengths), stepwise(given, lengths, 1)):  # type: ignore[arg-type]
        assert out is not None
        (first,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)  # type: ignore[arg-type]
        seconds.append(torch.autograd.grad(first.square().sum(), [given[0], given[4]]))  # type: ignore[list-item]
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_it_gives_way_where_nothing_learns_or_sizes_do_not_suit(level: str) -> None:
    given = inputs([5], 2, 16, 1, 16, 4)
    with torch.no_grad():
        assert mix_learning(given[0], weights_of(given, 1), [5]) is None  # type: ignore[arg-type]
    narrow = inputs([5], 2, 8, 1, 16, 4)
    assert mix_learning(narrow[0], weights_of(narrow, 1), [5]) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
def test_narrow_numbers_are_widened_once(level: str, kind: str) -> None:
    given = [x if x is None else x.detach() for x in inputs([40], 2, 16, 1, 16, 4)]
    narrow = torch.bfloat16
    # The scalars stay in float32.
    low = [x if x is None or (i in (3, 4, 5)) else x.to(narrow) for i, x in enumerate(given)]
    if kind == "autocast":
        low = [low[0], *given[1:]]
    for x in low:
        assert x is not None
        x.requires_grad_()
    with torch.autocast("cpu", enabled=kind == "autocast"):
        made = mix_learning(low[0], weights_of(low, 1), [40])  # type: ignore[arg-type]
    assert made is not None
    assert made.dtype == narrow
    along = torch.randn_like(made)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in low]
    wanted = all_of(stepwise(exact, [40], 1), exact, along.double())
    found = all_of(made, low, along)
    assert [x.dtype for x in found[1:]] == [x.dtype for x in low if x is not None]
    assert max(off(found, wanted)) < 2**-7
