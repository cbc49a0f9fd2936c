"""Which experts a token goes to, and how much each counts (DeepSeek-V2 and -V3).

Shapes: router logits (N, E) in float32; the experts chosen and their weights (N, A).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.backends import operation
from quintet.kernels.routing import Rules
from quintet.ops.one_pass import choose_experts

__all__ = [
    "RoutingRules",
    "balance_loss",
    "balanced_bias",
    "expert_load",
    "max_violation",
    "router_logits",
    "sigmoid_routing",
    "sigmoid_rules",
    "softmax_routing",
    "softmax_rules",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRules:
    """How a router chooses.

    Attributes:
        active: A, how many experts a token goes to.
        groups: how many groups the experts form.
        kept_groups: how many groups a token's experts may come from.
        normalise: whether a token's weights are made to sum to one.
        scaling: a factor of the weights.
    """

    active: int
    groups: int = 1
    kept_groups: int = 1
    normalise: bool = False
    scaling: float = 1.0


@operation("router logits")
def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return x·Wᵀ, (N, E), in float32: nearby experts must not change places.

    Shapes: x (N, C), weight (E, C).
    """
    return F.linear(x.to(torch.float32), weight.to(torch.float32))


def softmax_routing(logits: Tensor, rules: RoutingRules) -> tuple[Tensor, Tensor]:
    """Choose the experts with the highest softmax affinities (arXiv:2405.04434, §2.2.1-2.2.2).

    With groups, only those count whose best expert is among the `kept_groups` best. Weights are
    the affinities, normalised to sum to one or else scaled, never both.
    """
    output = choose_experts(logits, softmax_rules(rules))
    return _softmax_routing(logits, rules) if output is None else output


def softmax_rules(rules: RoutingRules) -> Rules:
    """Write the rules of `softmax_routing` for the kernel."""
    normalise = rules.normalise and rules.active > 1
    return Rules(
        active=rules.active,
        groups=rules.groups,
        kept_groups=rules.kept_groups,
        normalise=normalise,
        scaling=1.0 if normalise else rules.scaling,
    )


def _softmax_routing(logits: Tensor, rules: RoutingRules) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(dim=-1)
    choice = _in_best_groups(scores, rules, best=1)
    indices = choice.topk(rules.active, dim=-1, sorted=False).indices
    weights = scores.gather(1, indices)
    if rules.normalise and rules.active > 1:
        return indices, weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return indices, weights * rules.scaling


def sigmoid_routing(logits: Tensor, bias: Tensor, rules: RoutingRules) -> tuple[Tensor, Tensor]:
    """Choose by biased sigmoid affinities and weigh by unbiased ones (arXiv:2412.19437, §2.1.2).

    The bias (E,) steers load alone. With groups, only those count whose two best experts sum to
    one of the `kept_groups` highest sums. Weights are normalised if asked, then scaled.
    """
    output = choose_experts(logits, sigmoid_rules(rules), bias)
    return _sigmoid_routing(logits, bias, rules) if output is None else output


def sigmoid_rules(rules: RoutingRules) -> Rules:
    """Write the rules of `sigmoid_routing` for the kernel."""
    return Rules(
        sigmoid=True,
        active=rules.active,
        groups=rules.groups,
        kept_groups=rules.kept_groups,
        ranked=2,
        normalise=rules.normalise,
        scaling=rules.scaling,
    )


def _sigmoid_routing(logits: Tensor, bias: Tensor, rules: RoutingRules) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    choice = _in_best_groups(scores + bias, rules, best=2)
    indices = choice.topk(rules.active, dim=-1, sorted=False).indices
    weights = scores.gather(1, indices)
    if rules.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return indices, weights * rules.scaling


def balance_loss(scores: Tensor, indices: Tensor, mask: Tensor, *, per_row: bool) -> Tensor:
    """Return Σ_e f_e·P_e, the expert-level balance of a layer (arXiv:2405.04434, §2.2.3).

    f_e is how often expert e was chosen over how often it would be if all were chosen alike, P_e
    its mean affinity; balanced experts give 1. Both are taken over the tokens of each row, and the
    rows averaged, or over all tokens of the batch at once.

    Shapes: scores (B, T, E), indices (B, T, A), mask (B, T) with 1 for tokens and 0 for padding.
    """
    E, A = scores.shape[-1], indices.shape[-1]
    weight = mask.to(scores.dtype)[..., None]  # (B, T, 1)
    chosen = torch.zeros_like(scores).scatter_(-1, indices, 1.0) * weight
    scores = scores * weight
    if not per_row:
        chosen, scores, weight = (x.flatten(0, 1)[None] for x in (chosen, scores, weight))
    tokens = weight.sum(dim=1)  # (B, 1)
    counted = tokens.clamp(min=1)
    frequency = chosen.sum(dim=1) * (E / A) / counted
    losses = (frequency * scores.sum(dim=1) / counted).sum(dim=-1)
    # A row of nothing but padding has no balance and does not count.
    return losses.sum() / (tokens > 0).sum().clamp(min=1)


def expert_load(indices: Tensor, E: int) -> Tensor:
    """Count how often each of E experts was chosen; indices (N, A) -> (E,)."""
    flat = indices.flatten()
    return torch.zeros(E, dtype=torch.long, device=flat.device).scatter_add(
        0, flat, torch.ones_like(flat)
    )


def balanced_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Return b_e + rate · sign(mean load - load_e) (arXiv:2412.19437, §2.1.2).

    Experts that had too many tokens are chosen less from here on, and no gradient is bent for it.
    Shapes: bias and load (E,).
    """
    load = load.to(bias.dtype)
    return bias + rate * torch.sign(load.mean() - load)


def max_violation(load: Tensor) -> float:
    """Return MaxVio = max load / mean load - 1, 0 in perfect balance (arXiv:2408.15664, eq. 4)."""
    load = load.to(torch.float64)
    return float(load.max() / load.mean() - 1) if bool(load.any()) else 0.0


def _in_best_groups(scores: Tensor, rules: RoutingRules, *, best: int) -> Tensor:
    """Set scores (N, E) to -inf outside the groups whose `best` highest scores sum highest."""
    if rules.kept_groups == rules.groups:
        return scores
    grouped = scores.view(scores.shape[0], rules.groups, -1)  # (N, groups, E / groups)
    best = min(best, grouped.shape[-1])
    totals = grouped.topk(best, dim=-1).values.sum(dim=-1)
    winners = totals.topk(rules.kept_groups, dim=-1, sorted=False).indices
    lost = torch.ones_like(totals, dtype=torch.bool).scatter_(1, winners, False)
    return grouped.masked_fill(lost[..., None], -torch.inf).flatten(1)
