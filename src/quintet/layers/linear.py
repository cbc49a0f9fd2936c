"""Linear maps: one at a time, or several of the same input in one pass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from quintet.ops.linear import linear, linears

__all__ = ["Linear", "LinearMap", "project"]


class LinearMap(nn.Module, ABC):
    """A linear map that can share a pass over an input with others of its class.

    Each way to hold a matrix (plain, int8, int4, ...) is a class of its own, and `project` goes by
    the class.
    """

    @classmethod
    @abstractmethod
    def together(cls, x: Tensor, maps: Sequence[Self]) -> tuple[Tensor, ...]:
        """Return what each of `maps` makes of x (..., I)."""


class Linear(nn.Linear, LinearMap):
    """y = x·Wᵀ + b, with the weight as checkpoints have it, (O, I)."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return linear(input, self.weight, self.bias)

    @classmethod
    def together(cls, x: Tensor, maps: Sequence[Self]) -> tuple[Tensor, ...]:
        """Return what each of `maps` makes of x (..., I)."""
        return tuple(linears(x, [(m.weight, m.bias) for m in maps]))


def project(x: Tensor, *maps: nn.Module) -> tuple[Tensor, ...]:
    """Return what each map makes of the same x (..., I), in one pass where they are of one class.

    Maps that somebody wrapped or hooked, as adapters and profilers do, are called as usual.
    """
    kind = type(maps[0])
    # A subclass with another forward has to bring another `together`.
    if issubclass(kind, LinearMap) and "together" in vars(kind):
        alike = [m for m in maps if type(m) is kind and not _hooked(m)]
        if len(alike) == len(maps):
            return kind.together(x, alike)
    return tuple(m(x) for m in maps)


def _hooked(module: nn.Module) -> bool:
    """Tell whether calling the module may do more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or hooks._has_any_global_hook()  # type: ignore[no-untyped-call]
    )
