"""A stack of experts is as many gated MLPs."""

import torch

from quintet.layers.mlp import GatedMLP
from quintet.layers.moe import Experts
from support import relative_error


def test_experts_are_gated_mlps() -> None:
    E, C, F = 4, 10, 6
    experts = Experts(E, C, F, act="silu")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, C)
    indices, weights = torch.randint(E, (7, 1)), torch.rand(7, 1)
    made = experts(x, indices, weights)
    for expert in range(E):
        mlp = GatedMLP(C, F, act="silu")
        gate, up = experts.gate_up_proj[expert].chunk(2)
        mlp.load_state_dict(
            {
                "gate_proj.weight": gate,
                "up_proj.weight": up,
                "down_proj.weight": experts.down_proj[expert],
            }
        )
        rows = indices[:, 0] == expert
        if rows.any():
            assert relative_error(made[rows], mlp(x[rows]) * weights[rows]) < 1e-5


def test_experts_say_what_they_are() -> None:
    experts = Experts(4, 10, 6, act="gelu")
    assert list(experts.state_dict()) == ["gate_up_proj", "down_proj"]
    assert repr(experts) == "Experts(4 of 10 -> 6 -> 10)"
