"""Mixtures of experts: each token goes through a few of many MLPs."""

import torch
from torch import Tensor

from quintet.ops.activations import Activation

__all__ = ["apply_experts"]


def apply_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Activation
) -> Tensor:
    """Sum each token's experts by their weights: Σ_a w_a · down_e(act(gate_e(x)) · up_e(x)).

    Only experts that a token was routed to are read.
    Shapes: x (N, C); indices and weights (N, A); gate_up (E, 2F, C), the gate's rows first;
    down (E, C, F); returns (N, C).
    """
    out = torch.zeros_like(x)
    hits, order = indices.flatten().sort(stable=True)
    tokens = order // indices.shape[1]
    shares = weights.flatten()[order]
    experts, counts = torch.unique_consecutive(hits, return_counts=True)
    start = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        rows = tokens[start : start + count]
        gate, up = torch.nn.functional.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        made = torch.nn.functional.linear(act(gate) * up, down[expert])
        share = shares[start : start + count, None].to(made.dtype)
        out.index_add_(0, rows, made * share)
        start += count
    return out
