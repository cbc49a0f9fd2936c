"""Differentiable causal attention over packed texts, without materialised weights.

Kernels compute it and its gradient, of heads of queries and of values that need not be as long, in
less time than torch's fused attention for CPUs; the formula defines it, and serves where none is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quintet.kernels.causal import LANES, attend_texts, attend_texts_gradient
from quintet.ops.again import derived, learn


class AttentionOptions(NamedTuple):
    """The text lengths and the scale of the scores."""

    lengths: tuple[int, ...]
    scale: float


def attends_learning(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether kernels can compute this with gradients; shapes as below."""
    whole = q.shape[-1] % LANES == 0 and v.shape[-1] % LANES == 0
    return whole and q.shape[2] == k.shape[2] and q.numel() > 0 and learn(q, k, v)


def attend_learning(
    q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Sequence[int] | None = None
) -> Tensor:
    """Return causal softmax(q·kᵀ·scale)·v within each text.

    Shapes: q (B, H, T, D), k (B, K, T, D) and v (B, K, T, V) with H a multiple of K, the tokens of
    all rows being texts of `lengths`, by default one a row; returns (B, H, T, V).
    """
    B, _, T, _ = q.shape
    how = AttentionOptions((T,) * B if lengths is None else tuple(lengths), scale)
    narrow = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if narrow else q.dtype
    flat = (x.to(dtype).transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _Attention.apply(how, *flat)  # type: ignore[no-untyped-call]
    return torch.unflatten(out, 0, (B, T)).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Shapes: q (M, H, D), k (M, K, D), v (M, K, V)."""

    @staticmethod
    def forward(ctx: Any, how: AttentionOptions, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = attend_texts(q, k, v, *how)
        ctx.how = how
        if attended is None:
            ctx.save_for_backward(q, k, v)
            return _by_formula(q, k, v, how=how)
        ctx.save_for_backward(q, k, v, *attended)
        return attended[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        # Where a gradient of the gradient is asked for, the formula is recorded.
        if saved and not torch.is_grad_enabled():
            out, logs = saved
            found = attend_texts_gradient(grad, out, logs, q, k, v, *ctx.how)
            if found is not None:
                return None, *(x if need else None for x, need in zip(found, needed, strict=True))
        return None, *derived(partial(_by_formula, how=ctx.how), (q, k, v), grad, needed)


def _by_formula(q: Tensor, k: Tensor, v: Tensor, *, how: AttentionOptions) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    out = []
    for own in zip(*(torch.split(x, list(how.lengths)) for x in (q, k, v)), strict=True):
        queries, keys, values = (x.transpose(0, 1) for x in own)
        keys, values = (x.repeat_interleave(groups, dim=0) for x in (keys, values))
        scores = queries @ keys.mT * how.scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1, dtype=torch.float32)
        out.append((weights.to(q.dtype) @ values).transpose(0, 1))
    return torch.cat(out)
