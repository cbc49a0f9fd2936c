"""Normalisation."""

import torch
from torch import Tensor

from quintet.backends import operation

__all__ = ["rms_norm"]


@operation("rms norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale rows to unit root mean square: x / sqrt(mean(x²) + eps) · weight (arXiv:1910.07467).

    The row is normalised in float32 and rounded to the dtype of `x` before the weight is applied,
    the order in which the released checkpoints were trained. Shapes: x (..., C), weight (C).
    """
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)
