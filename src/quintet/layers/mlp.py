"""Feed-forward layers."""

from torch import Tensor, nn

from quintet.layers.linear import Linear, project
from quintet.ops.activations import Activation, activation

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
        gate, up = project(hidden_states, self.gate_proj, self.up_proj)
        return self.down_proj(self.act_fn(gate) * up)  # type: ignore[no-any-return]
