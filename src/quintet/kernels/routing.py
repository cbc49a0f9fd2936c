"""Expert routing: float32 logits without widening the weight, and the choice."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.kernels.calls import Call, begin

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings of a router.

    Attributes:
        sigmoid: whether a score is the sigmoid of a logit; otherwise it is the softmax over all.
        active: A, how many experts a token goes to.
        groups: how many groups the experts form.
        kept_groups: how many groups a token's experts may come from.
        ranked: how many of its best experts a group is ranked by, the sum of their scores.
        normalise: whether a token's weights are made to sum to one, before they are scaled.
        scaling: a factor of the weights.
    """

    sigmoid: bool = False
    active: int
    groups: int = 1
    kept_groups: int = 1
    ranked: int = 1
    normalise: bool = False
    scaling: float = 1.0

    def write(self, call: Call, E: int, bias: Tensor | None) -> None:
        """Write them for E experts and a bias (E,)."""
        whole = 0 < self.kept_groups <= self.groups and E % self.groups == 0 and self.ranked > 0
        call.fit &= whole and 0 < self.active <= E // self.groups * self.kept_groups
        call.integers(self.sigmoid, E, self.active, self.groups, self.kept_groups, self.ranked)
        call.integers(self.normalise)
        call.real(self.scaling)
        call.packed(bias, torch.float32, E)


def router_logits(x: Tensor, weight: Tensor) -> Tensor | None:
    """Return x·Wᵀ in float32, (N, E); x (N, C), weight (E, C). None where it does not apply."""
    call = begin()
    suffix = SUFFIX.get(x.dtype)
    if call is None or suffix is None or x.ndim != 2 or not len(x):
        return None
    (N, C), E = x.shape, weight.shape[0] if weight.ndim else 0
    call.integers(N, E, C)
    call.rows(x, x.dtype, N, C)
    call.rows(weight, x.dtype, E, C)
    made = call.output(x, N, E, dtype=torch.float32)
    return made if call.run(f"router_logits_{suffix}") else None


def choose(
    logits: Tensor, rules: Rules, bias: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return the experts (N, A) of tokens, the best first, and their weights; None if it cannot.

    The weights are in the dtype of the logits (N, E). The bias (E,) counts for the choice alone.
    """
    call = begin()
    suffix = SUFFIX.get(logits.dtype)
    if call is None or suffix is None or logits.ndim != 2 or not len(logits):
        return None
    N, E = logits.shape
    rules.write(call, E, bias)
    call.integers(N)
    call.packed(logits, logits.dtype, N, E)
    indices = call.output(logits, N, rules.active, dtype=torch.int64)
    weights = call.output(logits, N, rules.active, dtype=torch.float32)
    return (indices, weights.to(logits.dtype)) if call.run(f"choose_{suffix}") else None
