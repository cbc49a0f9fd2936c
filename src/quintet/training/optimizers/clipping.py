"""The norm of a gradient, and how it is kept small."""

from collections.abc import Iterable

import torch
from torch import Tensor


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all numbers of these tensors together, as float32.

    Of any dtypes and devices; it lies where the first does. 0 of none.
    """
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    if not norms:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    whole: Tensor = torch.linalg.vector_norm(
        torch.stack([one.to(norms[0].device) for one in norms])
    )
    return whole


@torch.no_grad()
def clip(tensors: Iterable[Tensor], whole: Tensor, most: float) -> None:
    """Scale tensors of the norm `whole` so that it is `most`, if it is more and finite."""
    scale = (most / (whole + 1e-6)).clamp(max=1.0)
    scale = torch.where(whole.isfinite(), scale, 1.0)
    for tensor in tensors:
        tensor.mul_(scale.to(tensor.device, tensor.dtype))
