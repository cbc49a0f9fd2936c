"""Routers of few tokens: logits in float32 without a wide copy of the weight, and the choice."""

import torch
from torch import Tensor

from quintet.kernels.native import INTEGER, POINTER, REAL, applies, entry, pointers

__all__ = ["router_logits", "sigmoid_routing"]

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
# Beyond so many tokens, a product of float32 matrices pays for the copy it needs.
MOST_TOKENS = 32


def router_logits(x: Tensor, weight: Tensor) -> Tensor | None:
    """Return x·Wᵀ in float32, (N, E); x (N, C), weight (E, C). None where it does not apply."""
    suffix = SUFFIX.get(x.dtype)
    N, C = x.shape
    if suffix is None or weight.dtype != x.dtype or not 0 < N <= MOST_TOKENS:
        return None
    if not applies(x, weight) or x.stride(1) != 1 or weight.stride(1) != 1:
        return None
    function = entry(f"quintet_router_logits_{suffix}", *(POINTER,) * 3, *(INTEGER,) * 5)
    if function is None:
        return None
    E = weight.shape[0]
    made = torch.empty((N, E), dtype=torch.float32)
    sizes = N, E, C, x.stride(0), weight.stride(0)
    function(x.data_ptr(), weight.data_ptr(), made.data_ptr(), *sizes)
    return made


def sigmoid_routing(
    logits: Tensor,
    bias: Tensor,
    *,
    active: int,
    groups: int,
    kept_groups: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor] | None:
    """Return what `ops.routing.sigmoid_routing` does; None where the kernel does not apply."""
    N, E = logits.shape
    if not 0 < N <= MOST_TOKENS or not applies(logits, bias):
        return None
    if any(x.dtype != torch.float32 or not x.is_contiguous() for x in (logits, bias)):
        return None
    function = entry("quintet_sigmoid_routing", *(POINTER,) * 3, REAL, *(POINTER,) * 2)
    if function is None:
        return None
    indices = torch.empty((N, active), dtype=torch.int64)
    weights = torch.empty((N, active), dtype=torch.float32)
    rules = pointers((N, E, active, groups, kept_groups, normalise))
    out = indices.data_ptr(), weights.data_ptr()
    function(logits.data_ptr(), bias.data_ptr(), rules, scaling, *out)
    return indices, weights
