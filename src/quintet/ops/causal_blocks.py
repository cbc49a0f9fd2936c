"""Causal attention in blocks, for training on short texts in bfloat16 on a CPU."""

from typing import Any

import torch
from torch import Tensor

# How the queries are cut, and up to which length of a text.
BLOCKS = 4
LONGEST = 1024


def in_blocks(q: Tensor) -> bool:
    """Return whether this is bfloat16 training on a CPU with texts short enough."""
    if q.device.type != "cpu" or q.shape[2] > LONGEST or torch.compiler.is_compiling():
        return False
    low = q.dtype == torch.bfloat16 or (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    return low and torch.is_grad_enabled() and q.requires_grad


def causal_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return causal softmax(q·kᵀ·scale)·v.

    Shapes: q (B, H, T, D), k and v (B, K, T, D) with H a multiple of K; returns (B, H, T, D).
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.to(torch.bfloat16) for x in (q * scale, k, v))
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _CausalBlocks.apply(*(x.flatten(0, 1) for x in (q, k, v)))  # type: ignore[no-untyped-call]
    return out.view(*q.shape[:3], -1)


class _CausalBlocks(torch.autograd.Function):
    """Attends block by block of queries, with plain products.

    With the gradient it takes half the time of torch's fused kernel for CPUs, and keeps the
    weights, which is why long texts do not come here. Shapes: q, k, v (N, T, D); the scores are
    q·kᵀ, unscaled.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.shape[1]
        size = -(-T // BLOCKS)
        hidden = _hidden(q, size)
        out, weights = torch.empty_like(v), []
        for start in range(0, T, size):
            end = min(start + size, T)
            scores = q[:, start:end] @ k[:, :end].mT
            scores[..., start:] += hidden[: end - start, : end - start]
            weights.append(scores.softmax(dim=-1))
            out[:, start:end] = weights[-1] @ v[:, :end]
        ctx.save_for_backward(q, k, v, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of the gradient is asked for, and the weights know nothing of q and k.
            return _derivable(q, k, v, grad, ctx.needs_input_grad)
        grad = grad.contiguous()
        for_q, for_k, for_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        start = 0
        for weight in weights:
            end = start + weight.shape[1]
            block_grad = grad[:, start:end]
            for_v[:, :end] += weight.mT @ block_grad
            moved = torch._softmax_backward_data(
                block_grad @ v[:, :end].mT, weight, -1, weight.dtype
            )
            for_q[:, start:end] = moved @ k[:, :end]
            for_k[:, :end] += moved.mT @ q[:, start:end]
            start = end
        return for_q, for_k, for_v


def _derivable(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    out = (q @ k.mT + _hidden(q, q.shape[1])).softmax(dim=-1) @ v
    wanted = [x for x, need in zip((q, k, v), needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _hidden(q: Tensor, size: int) -> Tensor:
    return q.new_full((size, size), -torch.inf).triu(1)
