"""Gradients through quantised matrices, to their inputs only.

So adapters can be trained on top of them. A matrix is decoded once more on the way back and is not
kept in between: what is held for a step is what the model held before.
"""

from typing import Any

import torch
from torch import Tensor

from quintet.quantization.formats import Parts, Shape, WeightFormat


def learns(*tensors: Tensor | None) -> bool:
    """Return whether any of these requires a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def product(
    weight_format: WeightFormat, x: Tensor, parts: Parts, shape: Shape, bias: Tensor | None
) -> Tensor:
    """Return x wᵀ + b, x (..., I), differentiable in x and b."""
    output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        x, weight_format, parts, shape
    )
    return output if bias is None else output + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_format: WeightFormat, parts: Parts, shape: Shape
    ) -> Tensor:
        ctx.matrix = weight_format, parts, shape
        return weight_format.linear(x, parts, shape, None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight_format, parts, shape = ctx.matrix
        (gradient,) = gradients
        return gradient @ weight_format.decode(parts, shape, gradient.dtype), None, None, None
