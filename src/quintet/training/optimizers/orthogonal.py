"""Matrices made orthogonal by the steps of Newton and Schulz."""

from functools import cache

import torch
from torch import Tensor

from quintet.kernels.build import best_level
from quintet.kernels.store import BuildError

# Of the polynomial that takes singular values to about 1: it is steep at 0, and does not settle.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonal(x: Tensor, *, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Return roughly the nearest orthogonal matrices of (N, m, n), in `dtype`.

    X ← aX + (bS + cS²)X with S = XXᵀ, from X/‖X‖ (arXiv:2502.16982 eq. 2). Singular values end
    between .7 and 1.2, and those near 0 higher than they were.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        S = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.bmm(S, S).mul_(C).add_(S, alpha=B), x, beta=A)
    return x.mT if tall else x


@cache
def quick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where its products are quicker than float32's, and float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16
    try:
        known = device.type == "cpu" and best_level() == "avx512_bf16"
    except BuildError:
        known = False
    return torch.bfloat16 if known else torch.float32
