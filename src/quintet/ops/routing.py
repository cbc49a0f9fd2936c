"""Expert routing of DeepSeek-V2 and V3.

Shapes: router logits (N, E) in float32; the experts chosen and their weights (N, A).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.backends import operation
from quintet.kernels.routing import Rules
from quintet.ops.one_pass import choose_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRules:
    """The settings of a router.

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
    """Return x·Wᵀ, (N, E), in float32, so that close experts keep their order.

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
    """Return the settings of `softmax_routing` for the kernel."""
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
    indices = softmax_choice(scores, rules)
    return indices, softmax_weights(scores, indices, rules)


def softmax_choice(scores: Tensor, rules: RoutingRules) -> Tensor:
    """Return the experts (N, A) with the highest affinities (N, E), of the best groups."""
    # Nothing of a choice has a gradient, and a graph of it would be kept for none.
    choice = _in_best_groups(scores.detach(), rules, best=1)
    return choice.topk(rules.active, dim=-1, sorted=False).indices


def softmax_weights(scores: Tensor, indices: Tensor, rules: RoutingRules) -> Tensor:
    """Return the weights (N, A) of the chosen experts, from affinities (N, E)."""
    weights = scores.gather(1, indices)
    if rules.normalise and rules.active > 1:
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * rules.scaling


def sigmoid_routing(logits: Tensor, bias: Tensor, rules: RoutingRules) -> tuple[Tensor, Tensor]:
    """Choose by biased sigmoid affinities and weigh by unbiased ones (arXiv:2412.19437, §2.1.2).

    The bias (E,) steers load alone. With groups, only those count whose two best experts sum to
    one of the `kept_groups` highest sums. Weights are normalised if asked, then scaled.
    """
    output = choose_experts(logits, sigmoid_rules(rules), bias)
    return _sigmoid_routing(logits, bias, rules) if output is None else output


def sigmoid_rules(rules: RoutingRules) -> Rules:
    """Return the settings of `sigmoid_routing` for the kernel."""
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
    indices = sigmoid_choice(scores, bias, rules)
    return indices, sigmoid_weights(scores, indices, rules)


def sigmoid_choice(scores: Tensor, bias: Tensor, rules: RoutingRules) -> Tensor:
    """Return the experts (N, A) with the highest biased affinities (N, E), of the best groups."""
    choice = _in_best_groups(scores.detach() + bias, rules, best=2)
    return choice.topk(rules.active, dim=-1, sorted=False).indices


def sigmoid_weights(scores: Tensor, indices: Tensor, rules: RoutingRules) -> Tensor:
    """Return the weights (N, A) of the chosen experts, from affinities (N, E)."""
    weights = scores.gather(1, indices)
    if rules.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * rules.scaling


def balance_loss(scores: Tensor, indices: Tensor, mask: Tensor, *, per_row: bool) -> Tensor:
    """Return Σ_e f_e·P_e, the expert-level balance of a layer (arXiv:2405.04434, §2.2.3).

    f_e is how often expert e was chosen over how often it would be if all were chosen alike, P_e
    its mean affinity; balanced experts give 1. Both are taken over the tokens of each row, and the
    rows averaged, or over all tokens of the batch at once.

    Shapes: scores (B, T, E), indices (B, T, A), mask (B, T) with 1 for tokens and 0 for padding.
    """
    n = len(mask) if per_row else 1
    rows = torch.arange(n, dtype=torch.long, device=mask.device)[:, None].expand_as(mask)
    # What is padding is a text of its own, behind all others, that nobody reads.
    texts = torch.where(mask.to(torch.bool), rows, n).flatten()
    chosen, affinity, tokens = balance_by_text(
        scores.flatten(0, 1), indices.flatten(0, 1), texts, n + 1
    )
    losses = (chosen * affinity).sum(dim=-1)[:n]
    # A row of nothing but padding has no balance and does not count.
    return losses.sum() / (tokens[:n] > 0).sum().clamp(min=1)


def balance_by_text(
    scores: Tensor,
    indices: Tensor,
    texts: Tensor,
    n: int,
    summed: Callable[[Tensor], Tensor] = lambda own: own,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return f (n, E), P (n, E) and the number of tokens (n,) of each text.

    Shapes: affinities `scores` (N, E), choices `indices` (N, A), `texts` (N,) which text each
    token is of. A text without tokens has zeros. Where other tokens of these texts are elsewhere,
    `summed` adds up what nothing learns from; P is then this share of a sum.
    """
    E, A = scores.shape[-1], indices.shape[-1]
    hits = torch.zeros_like(scores).scatter(1, indices, 1.0)
    tokens = summed(sum_by_text(torch.ones_like(scores[:, 0]), texts, n))
    counted = tokens.clamp(min=1)[:, None]
    frequency = summed(sum_by_text(hits, texts, n)) * (E / A) / counted
    return frequency, sum_by_text(scores, texts, n) / counted, tokens


def sum_by_text(values: Tensor, texts: Tensor, n: int) -> Tensor:
    """Sum values (N, ...) over the tokens of each of n texts, (n, ...); texts (N,)."""
    return values.new_zeros(n, *values.shape[1:]).index_add(0, texts, values)


def expert_load(indices: Tensor, E: int) -> Tensor:
    """Count how often each of E experts was chosen; indices (N, A) -> (E,)."""
    flat = indices.flatten()
    return torch.zeros(E, dtype=torch.long, device=flat.device).scatter_add(
        0, flat, torch.ones_like(flat)
    )


def balanced_bias(bias: Tensor, load: Tensor, rate: float, *, centred: bool = False) -> Tensor:
    """Return b_e + rate · sign(mean load - load_e) (arXiv:2412.19437, §2.1.2).

    Experts that had too many tokens are chosen less from here on, and no gradient is bent for it.
    Centred, the mean of what is added is subtracted from it: the biases' mean stays. Only their
    differences matter to a choice, but where loads are skewed all would drift one way.
    Shapes: bias and load (E,).
    """
    # The same sign in whole numbers, as a mean of large counts would be rounded.
    step = torch.sign(load.sum() - len(load) * load).to(bias.dtype)
    if centred:
        step = step - step.mean()
    return bias + rate * step


def max_violation(load: Tensor) -> float:
    """Return MaxVio = max load / mean load - 1, 0 in perfect balance (arXiv:2408.15664, eq. 4)."""
    load = load.to(torch.float64)
    return float(load.max() / load.mean() - 1) if bool(load.any()) else 0.0


def _in_best_groups(scores: Tensor, rules: RoutingRules, *, best: int) -> Tensor:
    """Set scores (N, E) to -inf outside the groups whose `best` highest scores sum highest."""
    if rules.kept_groups == rules.groups:
        return scores
    grouped = torch.unflatten(scores, 1, (rules.groups, -1))  # (N, groups, E / groups)
    best = min(best, grouped.shape[-1])
    totals = grouped.topk(best, dim=-1).values.sum(dim=-1)
    winners = totals.topk(rules.kept_groups, dim=-1, sorted=False).indices
    lost = torch.ones_like(totals, dtype=torch.bool).scatter_(1, winners, False)
    return grouped.masked_fill(lost[..., None], -torch.inf).flatten(1)
