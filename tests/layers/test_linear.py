from collections.abc import Sequence
from typing import Any, Self

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.layers.linear import Linear, LinearMap, project


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_several_maps_of_one_input_are_each_map_of_it(shape: tuple[int, ...]) -> None:
    maps = [Linear(5, 4), Linear(5, 1, bias=False), Linear(5, 7)]
    x = torch.randn(shape)
    for made, m in zip(project(x, *maps), maps, strict=True):
        torch.testing.assert_close(made, F.linear(x, m.weight, m.bias))


def test_gradients_go_through() -> None:
    maps, x = [Linear(3, 2), Linear(3, 4)], torch.randn(2, 3, requires_grad=True)
    sum(made.square().sum() for made in project(x, *maps)).backward()
    ours = [x.grad, *(p.grad for m in maps for p in m.parameters())]
    x.grad = None
    for m in maps:
        m.zero_grad()
    sum(F.linear(x, m.weight, m.bias).square().sum() for m in maps).backward()
    for mine, theirs in zip(
        ours, [x.grad, *(p.grad for m in maps for p in m.parameters())], strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_class_of_maps_brings_its_own_pass() -> None:
    class Counting(LinearMap):
        @classmethod
        def together(cls, x: Tensor, maps: Sequence[Self]) -> tuple[Tensor, ...]:
            return tuple(x + i for i in range(len(maps)))

        def forward(self, x: Tensor) -> Tensor:
            return -x

    x = torch.zeros(1)
    assert [int(y) for y in project(x, Counting(), Counting(), Counting())] == [0, 1, 2]
    # Maps of different kinds cannot share a pass.
    assert int(project(x + 1, Counting(), nn.Identity())[0]) == -1


def test_a_map_of_another_class_keeps_its_forward() -> None:
    class Doubled(Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    one, other, x = Linear(3, 2), Doubled(3, 2), torch.randn(4, 3)
    torch.testing.assert_close(project(x, one, other)[1], other(x))
    torch.testing.assert_close(project(x, other, other)[1], other(x))


@pytest.mark.parametrize("how", ["hook", "pre_hook", "forward"])
def test_a_hooked_map_is_called(how: str) -> None:
    one, other, x = Linear(3, 2), Linear(3, 2), torch.randn(4, 3)
    if how == "hook":
        other.register_forward_hook(lambda module, inputs, output: output + 1)
    elif how == "pre_hook":
        other.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    else:
        plain = other.forward

        def replaced(input: Tensor) -> Any:
            return plain(input) + 1

        other.forward = replaced  # type: ignore[method-assign]
    made = project(x, one, other)
    torch.testing.assert_close(made[1], other(x))
    assert not torch.allclose(made[1], F.linear(x, other.weight, other.bias))
