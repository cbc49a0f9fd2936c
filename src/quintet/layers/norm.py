"""Normalisation layers."""

import torch
from torch import Tensor, nn

from quintet.layers.plain import PlainModule
from quintet.ops.norm import rms_norm
from quintet.sharding import WHOLE, Sharding


class RMSNorm(PlainModule):
    """Root-mean-square normalisation with a learned scale (arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def sharding(self) -> Sharding:
        """Keep the weight whole: the normalised axis is never cut."""
        return Sharding({"weight": WHOLE})

    def extra_repr(self) -> str:
        """Show the size in `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
