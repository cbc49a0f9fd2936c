"""The experts of a layer, stacked."""

import torch
from torch import Tensor, nn

from quintet.ops.activations import Activation, activation
from quintet.ops.moe import apply_experts

__all__ = ["Experts"]


class Experts(nn.Module):
    """E gated MLPs in two parameters: gate_up_proj (E, 2F, C) and down_proj (E, C, F)."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, act: str | Activation
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.act_fn = activation(act)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Map tokens (N, C) through the experts `indices` (N, A), summed by `weights` (N, A)."""
        return apply_experts(x, indices, weights, self.gate_up_proj, self.down_proj, self.act_fn)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        E, C, F = self.down_proj.shape
        return f"{E} of {C} -> {F} -> {C}"
