"""Linear maps: x·Wᵀ + b."""

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.kernels.linear import Matrix
from quintet.kernels.linear import linears as few
from quintet.kernels.product import products as many

__all__ = ["linear", "linears"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x (..., I) by a weight (O, I) and a bias (O) to (..., O)."""
    return linears(x, [(weight, bias)])[0]


def linears(x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Tensor]:
    """Map the same x (..., I) by several weights (O, I) and biases (O), to (..., O) each."""
    matrices = [Matrix(weight, None, bias) for weight, bias in maps]
    output = few(x, matrices)
    output = many(x, matrices) if output is None else output
    return [F.linear(x, weight, bias) for weight, bias in maps] if output is None else output
