"""Linear maps: one at a time, or several on the same input in one pass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn

from quintet.kernels.matrix import Matrix
from quintet.layers.plain import PlainModule, hooked
from quintet.ops.linear import linear, linears


class LinearMap(PlainModule, ABC):
    """A linear map that can be applied together with others of its class.

    Each way to hold a matrix (plain, int8, int4, ...) is a class of its own, and `project` goes by
    the class.
    """

    @classmethod
    @abstractmethod
    def together(cls, x: Tensor, maps: Sequence[Self]) -> tuple[Tensor, ...]:
        """Apply each of `maps` to x (..., I)."""

    def matrix(self) -> Matrix | None:
        """Return the operands for a kernel, or None if no kernel reads them."""
        return None


class Linear(nn.Linear, LinearMap):
    """y = x·Wᵀ + b, with the weight as checkpoints have it, (O, I)."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return linear(input, self.weight, self.bias)

    def matrix(self) -> Matrix:
        """Return weight and bias."""
        return Matrix(self.weight, None, self.bias)

    @classmethod
    def together(cls, x: Tensor, maps: Sequence[Self]) -> tuple[Tensor, ...]:
        return tuple(linears(x, [(m.weight, m.bias) for m in maps]))


def project(x: Tensor, *maps: nn.Module) -> tuple[Tensor, ...]:
    """Apply several maps to the same x (..., I), in one pass if they share a class.

    Maps that somebody wrapped or hooked, as adapters and profilers do, are called as usual.
    """
    alike = _alike(maps)
    return tuple(m(x) for m in maps) if alike is None else type(alike[0]).together(x, alike)


def matrices(*maps: nn.Module, summed: nn.Module | None = None) -> list[Matrix] | None:
    """Return the operands of maps of one class, or None if one must be called.

    Args:
        summed: one of them, whose caller looks for sums over processes behind it himself.
    """
    found = [m.matrix() for m in _alike(maps, summed) or []]
    known = [matrix for matrix in found if matrix is not None]
    return known if len(known) == len(maps) else None


def _alike(maps: Sequence[nn.Module], summed: nn.Module | None = None) -> list[LinearMap] | None:
    kind = type(maps[0])
    # A subclass with another forward has to bring another `together`.
    if not issubclass(kind, LinearMap) or "together" not in vars(kind):
        return None
    alike = [m for m in maps if type(m) is kind and (m is summed or not hooked(m))]
    return alike if len(alike) == len(maps) else None
