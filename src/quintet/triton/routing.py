"""The choice of experts: a program has all scores of one token in registers, by groups."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quintet.kernels.routing import Rules
from quintet.triton.launching import launch, power_of_two, takes

# Scores of a token, in registers.
_MOST = 1024


def choose(
    logits: Tensor, rules: Rules, bias: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return the experts (N, A) of tokens, the best first, and their weights, in float32."""
    given = [logits] if bias is None else [logits, bias]
    if logits.ndim != 2 or logits.dtype != torch.float32 or not takes(*given):
        return None
    (N, E), A, G = logits.shape, rules.active, rules.groups
    fits = 0 < rules.kept_groups <= G and E % G == 0 and 0 < A <= E // G * rules.kept_groups
    if not N or not fits or rules.ranked < 1 or logits.stride(1) != 1:
        return None
    blocks = power_of_two(G), power_of_two(E // G)
    if blocks[0] * blocks[1] > _MOST:
        return None
    if bias is not None and (
        bias.shape != (E,) or bias.dtype != torch.float32 or not bias.is_contiguous()
    ):
        return None
    indices = torch.empty(N, A, dtype=torch.int64, device=logits.device)
    weights = logits.new_empty(N, A)
    launch(
        _choose,
        (N,),
        logits,
        logits.stride(0),
        bias,
        indices,
        weights,
        rules.scaling,
        G=G,
        EACH=E // G,
        G_BLOCK=blocks[0],
        EACH_BLOCK=blocks[1],
        A=A,
        A_BLOCK=power_of_two(A),
        KEPT=rules.kept_groups,
        RANKED=min(rules.ranked, E // G),
        SIGMOID=rules.sigmoid,
        NORMALISE=rules.normalise,
        num_warps=1,
    )
    return indices, weights


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits,
    step,
    bias,
    indices,
    weights,
    scaling,
    G: tl.constexpr,
    EACH: tl.constexpr,
    G_BLOCK: tl.constexpr,
    EACH_BLOCK: tl.constexpr,
    A: tl.constexpr,
    A_BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
    RANKED: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, G_BLOCK)
    j = tl.arange(0, EACH_BLOCK)
    e = g[:, None] * EACH + j[None, :]
    valid = (g < G)[:, None] & (j < EACH)[None, :]
    x = tl.load(logits + token * step + e, mask=valid, other=float("-inf"))
    if SIGMOID:
        scores = tl.sigmoid(x)
    else:
        raised = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = raised / tl.sum(tl.sum(raised, 1), 0)
    ranks = scores
    if bias is not None:
        ranks += tl.load(bias + e, mask=valid, other=0.0)
    # What is no number goes before all, as in torch.
    ranks = tl.where(ranks == ranks, ranks, float("inf"))
    if KEPT < G:
        totals = tl.zeros([G_BLOCK], tl.float32)
        left = valid
        for _ in range(RANKED):
            best = tl.max(tl.where(left, ranks, float("-inf")), 1)
            totals += best
            first = tl.min(tl.where(left & (ranks == best[:, None]), j[None, :], EACH_BLOCK), 1)
            left = left & (j[None, :] != first[:, None])
        losing = g < G
        for _ in range(KEPT):
            best = tl.max(tl.where(losing, totals, float("-inf")), 0)
            losing = losing & (g != tl.min(tl.where(losing & (totals == best), g, G_BLOCK), 0))
        valid = valid & (losing == 0)[:, None]
    a = tl.arange(0, A_BLOCK)
    chosen = tl.zeros([A_BLOCK], tl.int32)
    own = tl.zeros([A_BLOCK], tl.float32)
    for place in range(A):
        best = tl.max(tl.max(tl.where(valid, ranks, float("-inf")), 1), 0)
        first = tl.where(valid & (ranks == best), e, G_BLOCK * EACH_BLOCK)
        expert = tl.min(tl.min(first, 1), 0)
        score = tl.sum(tl.sum(tl.where(e == expert, scores, 0.0), 1), 0)
        chosen = tl.where(a == place, expert, chosen)
        own = tl.where(a == place, score, own)
        valid = valid & (e != expert)
    if NORMALISE:
        own = own / (tl.sum(own, 0) + 1e-20)
    tl.store(indices + token * A + a, chosen.to(tl.int64), mask=a < A)
    tl.store(weights + token * A + a, own * scaling, mask=a < A)
