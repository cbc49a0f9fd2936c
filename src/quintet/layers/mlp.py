"""Feed-forward layers."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.kernels.gated import gated
from quintet.kernels.product import gated_products
from quintet.layers.linear import Linear, matrices, project
from quintet.ops.activations import Activation, activation, gate_by

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), a gated linear unit (arXiv:2002.05202)."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, act: str | Activation, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = activation(act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        if self.act_fn is F.silu:
            held = matrices(self.gate_proj, self.up_proj, self.down_proj)
            if held is not None:
                made = gated(hidden_states, held[0], held[1], held[2])
                if made is not None:
                    return made
                inside = gated_products(hidden_states, held[0], held[1])
                if inside is not None:
                    return self.down_proj(inside)  # type: ignore[no-any-return]
        gate, up = project(hidden_states, self.gate_proj, self.up_proj)
        return self.down_proj(gate_by(self.act_fn, gate, up))  # type: ignore[no-any-return]
