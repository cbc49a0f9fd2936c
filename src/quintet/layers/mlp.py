"""Feed-forward layers."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.kernels import parts
from quintet.kernels.matrix import Matrix
from quintet.layers.linear import Linear, matrices, project
from quintet.layers.plain import untouched
from quintet.layers.stack import FusedPart
from quintet.ops.activations import Activation, activation, gate_by
from quintet.ops.one_pass import gate_in_one_pass, gated_mlp
from quintet.sharding import WHOLE, Section, Sharding, columns, rows


class GatedMLP(FusedPart):
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
            weights = matrices(self.gate_proj, self.up_proj, self.down_proj)
            if weights is not None:
                output = gated_mlp(hidden_states, weights[0], weights[1], weights[2])
                if output is not None:
                    return output
                inside = gate_in_one_pass(hidden_states, weights[0], weights[1])
                if inside is not None:
                    return self.down_proj(inside)  # type: ignore[no-any-return]
        gate, up = project(hidden_states, self.gate_proj, self.up_proj)
        return self.down_proj(gate_by(self.act_fn, gate, up))  # type: ignore[no-any-return]

    def sharding(self, key: str = "intermediate_size") -> Sharding:
        """Split the inner channels over processes; the output is a partial sum."""
        inner = Section(self.gate_proj.out_features, 1, key)
        return Sharding(
            {
                "gate_proj.weight": rows(inner),
                "gate_proj.bias": rows(inner),
                "up_proj.weight": rows(inner),
                "up_proj.bias": rows(inner),
                "down_proj.weight": columns(inner),
                "down_proj.bias": WHOLE,
            },
            first_only=("down_proj.bias",),
        )

    def part(self, norm: parts.Norm) -> parts.Part | None:
        """Describe the maps to the fused CPU step; None unless the activation is SiLU."""
        weights = _silu_matrices(self)
        return None if weights is None else parts.MLP(norm, *weights)


def silu_matrices(mlp: nn.Module) -> tuple[Matrix, Matrix, Matrix] | None:
    """Return gate, up and down of a SiLU MLP, or None if it must be called."""
    plain = untouched(mlp, GatedMLP)
    return None if plain is None else _silu_matrices(plain)


def _silu_matrices(mlp: GatedMLP) -> tuple[Matrix, Matrix, Matrix] | None:
    if type(mlp) is not GatedMLP or mlp.act_fn is not F.silu:
        return None
    weights = matrices(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return None if weights is None else (weights[0], weights[1], weights[2])
