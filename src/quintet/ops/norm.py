"""Normalisation."""

from functools import partial

import torch
from torch import Tensor

from quintet.backends import operation
from quintet.kernels import rows
from quintet.kernels.rows_gradient import rms_norm_gradient
from quintet.ops.again import Rule, keeping_inputs, learn


@operation("rms norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale rows to unit root mean square: x / sqrt(mean(x²) + eps) · weight (arXiv:1910.07467).

    The row is normalised in float32 and rounded to the dtype of `x` before the weight is applied,
    the order in which the released checkpoints were trained. Shapes: x (..., C), weight (C).
    """
    if x.dtype == weight.dtype and learn(x, weight):
        rule = Rule(
            partial(_by_formula, eps=eps),
            partial(rows.rms_norm, eps=eps),
            partial(rms_norm_gradient, eps=eps),
        )
        return keeping_inputs(rule, x, weight)
    return _by_formula(x, weight, eps)


def _by_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)
