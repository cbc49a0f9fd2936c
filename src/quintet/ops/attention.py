"""Softmax attention: softmax(q·kᵀ·scale)·v over the keys a query sees (arXiv:1706.03762, §3.2).

`eager` is the definition. `sdpa` and `flash_attention_2` compute the same function.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from quintet.errors import MissingDependencyError, UnsupportedBackendError
from quintet.kernels.attention import attend
from quintet.kernels.decode import decode
from quintet.ops.masks import Visibility, causal_mask

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "attention_backend",
    "eager",
    "flash",
    "in_blocks",
    "sdpa",
]

# How training on a CPU cuts its queries, and up to which length it does.
BLOCKS = 4
LONGEST_IN_BLOCKS = 1024


class AttentionBackend(Protocol):
    """One way to compute attention.

    Shapes: q (B, H, T, D), k and v (B, K, S, D) with H a multiple of K; returns the values
    (B, H, T, D) and, where the backend has them, the weights (B, H, T, S).
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Attend."""
        ...


def eager(
    q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, scale: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Attend by the formula, with the softmax in float32; the only backend that has weights."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * scale  # (B, H, T, S)
    mask = seen.mask
    if seen.is_causal:
        slots = torch.arange(q.shape[2], dtype=torch.long, device=q.device)
        mask = causal_mask(slots[None], k.shape[2], None)
    if mask is not None and mask.dtype == torch.bool:
        # The lowest finite number, not -inf: a row that sees nothing stays finite.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v, weights


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, scale: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Attend by `torch.nn.functional.scaled_dot_product_attention`, or by a kernel for CPUs."""
    if not seen.custom and not dropout:
        made = decode(q, k, v, start=seen.start, window=seen.window, scale=scale)
        if made is not None:
            return made, None
        made = attend((q,), (k,), v, start=seen.start, window=seen.window, scale=scale)
        if made is not None:
            return made, None
    if seen.is_causal and not dropout and in_blocks(q):
        return _causal_blocks(q, k, v, scale), None
    mask = seen.mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=seen.is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out, None


def flash(
    q: Tensor, k: Tensor, v: Tensor, seen: Visibility, *, scale: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Attend by the flash-attn package, version 2 (arXiv:2307.08691).

    Raises:
        UnsupportedBackendError: a 4-D mask of the caller's own, a dtype it has no kernel for, or
            training on rows of a cache that have lengths of their own.
    """
    if seen.custom:
        raise UnsupportedBackendError(
            "attn_implementation='flash_attention_2' cannot take a 4-D attention_mask; "
            "use 'sdpa' or 'eager'"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedBackendError(
            f"attn_implementation='flash_attention_2' computes in float16 or bfloat16, "
            f"not {q.dtype}; load the model with dtype='bfloat16', or use 'sdpa'"
        )
    if not isinstance(seen.start, int) and (
        dropout or (torch.is_grad_enabled() and _learns(q, k, v))
    ):
        # The kernel for a cache has neither; it would leave the gradients out without a word.
        raise UnsupportedBackendError(
            "attn_implementation='flash_attention_2' has no gradients and no dropout for rows "
            "that continue a cache at lengths of their own; use torch.no_grad(), or 'sdpa'"
        )
    package = import_module("flash_attn")
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T, H, D)
    # Both kernels align the diagonal with the last key, and count a window without the query.
    window = (-1, -1) if seen.window is None else (seen.window - 1, 0)
    if isinstance(seen.start, int):
        end = seen.start + q.shape[1]
        out = package.flash_attn_func(
            q,
            k[:, :end],
            v[:, :end],
            dropout_p=dropout,
            softmax_scale=scale,
            causal=True,
            window_size=window,
        )
    else:
        out = package.flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=(seen.start + q.shape[1]).to(torch.int32),
            softmax_scale=scale,
            causal=True,
            window_size=window,
        )
    return out.transpose(1, 2), None


def in_blocks(q: Tensor) -> bool:
    """Tell whether this is training on a CPU in bfloat16, on texts short enough for `BLOCKS`."""
    if q.device.type != "cpu" or q.shape[2] > LONGEST_IN_BLOCKS or torch.compiler.is_compiling():
        return False
    low = q.dtype == torch.bfloat16 or (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )
    return low and torch.is_grad_enabled() and q.requires_grad


class _CausalBlocks(torch.autograd.Function):
    """Attend block by block of queries, each to the keys up to its end, with plain products.

    With the gradient it takes half the time of torch's fused kernel for CPUs, and keeps the
    weights, which is why long texts do not come here. Shapes: q, k, v (N, T, D); the scores are
    q·kᵀ, unscaled.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.shape[1]
        size = -(-T // BLOCKS)
        hidden = q.new_full((size, size), -torch.inf).triu(1)
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        for_q, for_k, for_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        start = 0
        for weight in weights:
            end = start + weight.shape[1]
            here = grad[:, start:end]
            for_v[:, :end] += weight.mT @ here
            moved = torch._softmax_backward_data(here @ v[:, :end].mT, weight, -1, weight.dtype)
            for_q[:, start:end] = moved @ k[:, :end]
            for_k[:, :end] += moved.mT @ q[:, start:end]
            start = end
        return for_q, for_k, for_v


def _causal_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.to(torch.bfloat16) for x in (q * scale, k, v))
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _CausalBlocks.apply(*(x.flatten(0, 1) for x in (q, k, v)))  # type: ignore[no-untyped-call]
    return out.view(*q.shape[:3], -1)


def _learns(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType(
    {"eager": eager, "sdpa": sdpa, "flash_attention_2": flash}
)


def attention_backend(name: str) -> AttentionBackend:
    """Return the backend of that name.

    Raises:
        UnsupportedBackendError: there is none.
        MissingDependencyError: its package is not installed.
    """
    if name not in BACKENDS:
        raise UnsupportedBackendError(
            f"attn_implementation={name!r} has to be one of {list(BACKENDS)}"
        )
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise MissingDependencyError(
            "attn_implementation='flash_attention_2' needs the package flash-attn, which is not "
            "installed; run `pip install flash-attn` on a machine with CUDA, or use 'sdpa'"
        )
    return BACKENDS[name]
