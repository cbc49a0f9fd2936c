"""Attention over pages by flash-attn, version 2 (arXiv:2307.08691)."""

from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from quintet.backends import Backend, Implementation
from quintet.published.packages import lacking, takes
from quintet.triton.pages import Coded, Memory, Pages

_FLOATS = (torch.bfloat16, torch.float16)
# A page has to be a multiple of so many slots, and a vector has at most so many numbers.
_PAGE, _LONGEST = 256, 256


class FlashAttention(Protocol):
    """The functions of the package that are called."""

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
    ) -> Tensor:
        """Attend from (n, T, H, D) to (P, page, K, D), as many of a sequence as there are."""
        ...

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        block_table: Tensor | None,
    ) -> Tensor:
        """Attend from (N, H, D) to (P, page, K, D), or without a table to (N, K, D)."""
        ...


def attend_pages(
    q: tuple[Tensor, ...],
    k: tuple[Memory, ...],
    v: Memory | None,
    pages: Pages,
    *,
    window: int | None,
    scale: float,
) -> Tensor | None:
    """Compute `ops.paged.attend_pages`, (N, H, D), for grouped queries of whole ratio."""
    if len(q) != 1 or v is None or isinstance(v, Coded) or isinstance(k[0], Coded):
        return None
    (queries,), keys, values, table = q, k[0], v, pages.table
    given = [queries, keys, values, pages.starts, pages.ends, *(() if table is None else (table,))]
    if not _fits(queries, keys, values, pages) or not takes(*given):
        return None
    package = cast("FlashAttention", import_module("flash_attn"))
    # Both align the last query with the last key, and count a window without the query.
    seen = (-1, -1) if window is None else (window - 1, 0)
    N, n = len(queries), len(pages.starts)
    if table is None:
        keys, values = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        ends, longest = pages.ends, pages.most
    else:
        # Of a sequence that is nowhere there is nothing to see.
        lengths = torch.where(table[:, 0] < 0, 0, pages.starts + pages.ends.diff()).int()
        table, keys, values = table.clamp(min=0), keys.transpose(1, 2), values.transpose(1, 2)
        if n * pages.most == N:
            output = package.flash_attn_with_kvcache(
                torch.unflatten(queries, 0, (n, pages.most)),
                keys,
                values,
                cache_seqlens=lengths,
                block_table=table,
                softmax_scale=scale,
                causal=True,
                window_size=seen,
            )
            return output.flatten(0, 1)
        ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = pages.longest
    return package.flash_attn_varlen_func(
        queries,
        keys,
        values,
        pages.ends,
        ends,
        pages.most,
        longest,
        softmax_scale=scale,
        causal=True,
        window_size=seen,
        block_table=table,
    )


def _fits(q: Tensor, k: Tensor, v: Tensor, pages: Pages) -> bool:
    """Return whether shapes, steps and dtypes suit the package."""
    D = q.shape[-1]
    return (
        q.dtype in _FLOATS
        and k.dtype == v.dtype == q.dtype
        and k.shape == v.shape
        and k.shape[-1] == D <= _LONGEST
        and D % 8 == 0
        and q.shape[1] % k.shape[1] == 0
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and bool(len(q) and len(pages.starts))
        and (len(k) == 1 if pages.table is None else k.shape[2] % _PAGE == 0)
    )


BACKEND = Backend(
    name="flash-attn",
    device="cuda",
    implementations={
        "attention over pages": (
            Implementation(attend_pages, frozenset(_FLOATS), "pages of a multiple of 256 slots"),
        )
    },
    missing=lacking("flash_attn", 80),
    on_request=True,
)
