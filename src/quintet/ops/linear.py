"""Linear maps: x·Wᵀ + b."""

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.backends import operation
from quintet.kernels.matrix import Matrix


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x (..., I) by a weight (O, I) and a bias (O) to (..., O)."""
    return linears(x, [(weight, bias)])[0]


def linears(x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Tensor]:
    """Map x (..., I) by several weights (O, I) and biases (O), to (..., O) each."""
    return map_all(x, [Matrix(weight, None, bias) for weight, bias in maps])


@operation("linear")
def map_all(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor]:
    """Map x (..., I) by several plain matrices, to (..., O) each."""
    return [F.linear(x, one.weight, one.bias) for one in maps]
