"""Softmax attention: softmax(q·kᵀ·scale)·v over the keys a query sees (arXiv:1706.03762, §3.2).

`eager` is the definition. `sdpa` and `flash_attention_2` compute the same function.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import MissingDependencyError, UnsupportedBackendError, shown
from quintet.ops.causal_blocks import causal_blocks, in_blocks
from quintet.ops.causal_learning import attend_learning, attends_learning
from quintet.ops.masks import MOST_ENTRIES, AttentionMask, causal_mask, masked
from quintet.ops.one_pass import attend_in_one_pass
from quintet.ops.paged import attend_rows
from quintet.ops.transforms import transformed


class AttentionBackend(Protocol):
    """Interface of an attention implementation.

    Shapes: q (B, H, T, D), k and v (B, K, S, D) with H a multiple of K; returns the values
    (B, H, T, D) and, where the backend has them, the weights (B, H, T, S).
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Attend."""
        ...


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, scale: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Attend by the definition, softmax in float32; the only backend that returns weights."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    q_wide, k_wide, precision = in_range(q, k)
    with precision:
        scores = masked(q_wide @ k_wide.transpose(-1, -2) * scale, mask)  # (B, H, T, S)
        # All scores of an infinite query may be -inf, below those of keys that it does not see.
        scores = scores + (q_wide * 0).sum(dim=-1, keepdim=True)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v, weights


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, scale: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Attend with torch's `scaled_dot_product_attention`, or a registered backend."""
    if transformed():
        # The fused attention has no rules for that.
        return eager(q, k, v, mask, scale=scale, dropout=dropout)[0], None
    if mask.pages is not None and not dropout:
        own = attend_rows((q,), (k,), v, mask, scale=scale)
        if own is not None:
            return own, None
    if not mask.custom and not dropout:
        output = attend_in_one_pass(
            (q,), (k,), v, start=mask.start, window=mask.window, scale=scale
        )
        if output is not None:
            return output, None
    if mask.is_causal and not dropout and attends_learning(q, k, v):
        return attend_learning(q, k, v, scale), None
    if mask.is_causal and not dropout and in_blocks(q):
        return causal_blocks(q, k, v, scale), None
    if mask.slots is not None:
        return _by_queries(q, k, v, mask, mask.slots, scale=scale, dropout=dropout), None
    return _fused(
        q, k, v, mask.entries, is_causal=mask.is_causal, scale=scale, dropout=dropout
    ), None


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    dropout: float,
    is_causal: bool = False,
) -> Tensor:
    if mask is not None and mask.is_floating_point():
        # The lowest number of a wider dtype would be -inf, and a row of them no number.
        lowest = max(torch.finfo(q.dtype).min, torch.finfo(mask.dtype).min)
        mask = mask.clamp(min=lowest).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        # Not what a program that is recorded for any length makes of a comparison of lengths.
        is_causal=True if is_causal else False,  # noqa: SIM210
        scale=scale,
        enable_gqa=True if q.shape[1] != k.shape[1] else False,  # noqa: SIM210
    )
    return _shown(out, q, k if mask is None else None) if q.device.type == "cpu" else out


def _shown(out: Tensor, q: Tensor, k: Tensor | None) -> Tensor:
    """Return the results with NaN where no score of a query is a number.

    The fused attention for CPUs takes such a query for one that sees no key, and gives 0. A query
    is one if it is NaN or infinite, or if the first key, which every query sees, is NaN.
    """
    broken = (q * 0).sum(dim=-1, keepdim=True).isnan()
    if k is not None:
        first = k[:, :, :1].isnan().any(dim=-1, keepdim=True)
        broken = broken | first.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return out.masked_fill(broken, torch.nan)


def _by_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    slots: Tensor,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attend in chunks of queries, so that no mask is large."""
    T, S = q.shape[2], k.shape[2]
    size = max(1, MOST_ENTRIES // (len(slots) * S))
    out = []
    for first in range(0, T, size):
        last = min(first + size, T)
        begin, end = mask.keys_of(first, last, S)
        entries = causal_mask(slots[:, first:last], end, mask.window, begin=begin)
        keys, values = k[:, :, begin:end], v[:, :, begin:end]
        out.append(_fused(q[:, :, first:last], keys, values, entries, scale=scale, dropout=dropout))
    return torch.cat(out, dim=2)


def flash(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, scale: float, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Attend with the flash-attn package, version 2 (arXiv:2307.08691).

    Raises:
        UnsupportedBackendError: a 4-D mask of the caller's own, a dtype it has no kernel for, or
            training on rows of a cache that have lengths of their own.
    """
    if mask.custom:
        raise UnsupportedBackendError(
            "attn_implementation='flash_attention_2' cannot take a 4-D attention_mask; "
            "use 'sdpa' or 'eager'"
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedBackendError(
            f"attn_implementation='flash_attention_2' computes in float16 or bfloat16, "
            f"not {q.dtype}; load the model with dtype='bfloat16', or use 'sdpa'"
        )
    if not isinstance(mask.start, int) and (
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
    window = (-1, -1) if mask.window is None else (mask.window - 1, 0)
    if isinstance(mask.start, int):
        end = mask.start + q.shape[1]
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
            cache_seqlens=(mask.start + q.shape[1]).to(torch.int32),
            softmax_scale=scale,
            causal=True,
            window_size=window,
        )
    return out.transpose(1, 2), None


def in_range(*tensors: Tensor) -> tuple[Any, ...]:
    """Widen float16 to float32, and return the context in which to compute scores.

    float16 ends at 65,504, which a product of queries and keys passes before it is scaled; what
    would be float16, also by autocast, is widened to float32.
    """
    device = tensors[0].device.type
    chosen = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    narrow = torch.get_autocast_dtype(device) if chosen else tensors[0].dtype
    if narrow != torch.float16:
        return (*tensors, nullcontext())
    return (*(x.to(torch.float32) for x in tensors), torch.autocast(device, enabled=False))


def _learns(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType(
    {"eager": eager, "sdpa": sdpa, "flash_attention_2": flash}
)


def attention_backend(name: str) -> AttentionBackend:
    """Return the attention implementation of a name.

    Raises:
        UnsupportedBackendError: there is none.
        MissingDependencyError: its package is not installed.
    """
    if name not in BACKENDS:
        raise UnsupportedBackendError(
            f"attn_implementation={shown(name)} has to be one of {list(BACKENDS)}"
        )
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise MissingDependencyError(
            "attn_implementation='flash_attention_2' needs the package flash-attn, which is not "
            "installed; run `pip install flash-attn` on a machine with CUDA, or use 'sdpa'"
        )
    return BACKENDS[name]
