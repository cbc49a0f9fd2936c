"""Routers of few tokens: logits in float32 without a wide copy of the weight, and the choice."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.kernels.native import INTEGER, POINTER, applies, entry, pointers, real

__all__ = ["Rules", "choose", "router_logits"]

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
# Beyond so many tokens, a product of float32 matrices pays for the copy it needs.
MOST_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How experts are chosen by their scores, which logits give.

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

    def fields(self, E: int, bias: Tensor | None) -> tuple[int, ...] | None:
        """Return what the kernel reads for E experts and a bias (E,); None if it cannot."""
        if not 0 < self.kept_groups <= self.groups or E % self.groups:
            return None
        if not 0 < self.active <= E // self.groups * self.kept_groups:
            return None
        stored = bias is None or (bias.dtype, bias.shape) == (torch.float32, (E,))
        if not stored or not (bias is None or bias.is_contiguous()):
            return None
        return (
            int(self.sigmoid),
            E,
            self.active,
            self.groups,
            self.kept_groups,
            self.ranked,
            int(self.normalise),
            real(self.scaling),
            0 if bias is None else bias.data_ptr(),
        )


def router_logits(x: Tensor, weight: Tensor) -> Tensor | None:
    """Return x·Wᵀ in float32, (N, E); x (N, C), weight (E, C). None where it does not apply."""
    # Asked first: a compiler that traces this must see none of the conditions.
    if not applies(x, weight):
        return None
    suffix = SUFFIX.get(x.dtype)
    N, C = x.shape
    if suffix is None or weight.dtype != x.dtype or not 0 < N <= MOST_TOKENS:
        return None
    if x.stride(1) != 1 or weight.stride(1) != 1:
        return None
    function = entry(f"quintet_router_logits_{suffix}", POINTER)
    if function is None:
        return None
    E = weight.shape[0]
    made = x.new_empty((N, E), dtype=torch.float32)
    sizes = N, E, C, x.stride(0), weight.stride(0)
    function(pointers((x.data_ptr(), weight.data_ptr(), made.data_ptr(), *sizes)))
    return made


def choose(
    logits: Tensor, rules: Rules, bias: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return the experts (N, A) of tokens, the best first, and their weights; None if it cannot.

    The weights are in the dtype of the logits (N, E). The bias (E,) counts for the choice alone.
    """
    if not (applies(logits) if bias is None else applies(logits, bias)):
        return None
    suffix = SUFFIX.get(logits.dtype)
    N, E = logits.shape
    if suffix is None or not 0 < N <= MOST_TOKENS or not logits.is_contiguous():
        return None
    fields = rules.fields(E, bias)
    function = entry(f"quintet_choose_{suffix}", *(POINTER,) * 2, INTEGER, *(POINTER,) * 2)
    if function is None or fields is None:
        return None
    indices = logits.new_empty((N, rules.active), dtype=torch.int64)
    weights = logits.new_empty((N, rules.active), dtype=torch.float32)
    out = indices.data_ptr(), weights.data_ptr()
    function(pointers(fields), logits.data_ptr(), N, *out)
    return indices, weights.to(logits.dtype)
