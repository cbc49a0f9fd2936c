"""Fused operations that a backend may provide; None if none does.

Each returns None if no backend does; who calls it then takes the steps, which define it.
"""

from torch import Tensor

from quintet.backends import operation
from quintet.kernels.matrix import Matrix
from quintet.kernels.routing import Rules
from quintet.kernels.ssm import MixerWeights


@operation("attention")
def attend_in_one_pass(
    q: tuple[Tensor, ...],
    k: tuple[Tensor, ...],
    v: Tensor,
    *,
    start: int | Tensor,
    window: int | None,
    scale: float,
) -> Tensor | None:
    """Return softmax(q·kᵀ·scale)·v, (B, H, T, Dv).

    Query i of a row sees the keys up to slot `start` + i, at most the last `window` of them.
    Queries and keys come in one part or two, as if joined along the last axis; a part of the keys
    with one head is shared by all.

    Shapes: q (B, H, T, D) each, k (B, K or 1, S, D) each, v (B, K, S, Dv), start (B).
    """
    return None


@operation("latent attention")
def attend_latents(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    w_kv: Tensor,
    *,
    start: int | Tensor,
    scale: float,
) -> Tensor | None:
    """Return `ops.mla.absorbed`, (B, H, T, Dv); shapes as there, start (B)."""
    return None


@operation("gated mlp")
def gated_mlp(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    indices: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor | None:
    """Return down(silu(gate x) · up x), with `indices` summed by `shares` over a token's experts.

    Shapes: x (..., C); gate and up (F, C), down (C, F). With indices and shares (N, A), x is
    (N, C) and weights are (E, ...).
    """
    return None


@operation("gate")
def gate_in_one_pass(x: Tensor, gate: Matrix, up: Matrix) -> Tensor | None:
    """Return silu(gate x) · up x; x (..., I), gate and up (F, I), returns (..., F)."""
    return None


@operation("choice of experts")
def choose_experts(
    logits: Tensor, rules: Rules, bias: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return the experts (N, A) of tokens, the best first, and their weights."""
    return None


@operation("mamba2")
def mix_in_one_pass(
    projected: Tensor,
    weights: MixerWeights,
    *,
    window: Tensor | None,
    state: Tensor | None,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Return the fields of `ops.mamba2.Mixed`; the state is overwritten."""
    return None
