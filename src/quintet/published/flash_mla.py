"""Attention over pages of latents by FlashMLA (arXiv:2405.04434, §2.1, absorbed)."""

from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from quintet.backends import Backend, Implementation
from quintet.published.packages import lacking, takes
from quintet.triton.pages import Coded, Memory, Pages

_FLOATS = (torch.bfloat16, torch.float16)
# Numbers of a latent and of a rotated key, and slots of a page: the package has no others.
_LATENT, _ROTATED, _PAGE = 512, 64, 64
_WIDTH = _LATENT + _ROTATED


class FlashMLA(Protocol):
    """The functions of the package that are called."""

    def get_mla_metadata(
        self, cache_seqlens: Tensor, num_q_tokens_per_head_k: int, num_heads_k: int
    ) -> tuple[object, object]:
        """Return the schedule of the work, an argument of its next call."""
        ...

    def flash_mla_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        head_dim_v: int,
        tile_scheduler_metadata: object,
        num_splits: object,
        *,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attend from (n, T, H, 576) to (P, 64, 1, 576); return (n, T, H, 512), and sums."""
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
    """Compute `ops.paged.attend_pages`, (N, H, 512), for latents beside their keys."""
    if len(q) != 2 or v is not None or window is not None or pages.table is None:
        return None
    latents, keys = k
    if isinstance(latents, Coded) or isinstance(keys, Coded):
        return None
    n, table = len(pages.starts), pages.table
    if not _fits(q, latents, keys, n * pages.most):
        return None
    if not takes(*q, latents, keys, table, pages.starts, pages.ends):
        return None
    # Pages of the package lie behind each other, and one here is several of them.
    pages_of_each = latents.stride(0) // (_PAGE * _WIDTH)
    room = latents.shape[2] // _PAGE
    blocks = latents.as_strided(
        ((len(latents) - 1) * pages_of_each + room, _PAGE, 1, _WIDTH),
        (_PAGE * _WIDTH, _WIDTH, _WIDTH, 1),
    )
    number = torch.arange(room, dtype=torch.int32, device=table.device)
    block_table = (table.clamp(min=0)[..., None] * pages_of_each + number).flatten(1)
    # Of a sequence that is nowhere there is nothing to see.
    lengths = torch.where(table[:, 0] < 0, 0, pages.starts + pages.ends.diff()).int()
    queries = torch.unflatten(torch.cat(q, dim=-1), 0, (n, pages.most))
    package = cast("FlashMLA", import_module("flash_mla"))
    plan = package.get_mla_metadata(lengths, pages.most * queries.shape[2], 1)
    output, _ = package.flash_mla_with_kvcache(
        queries, blocks, block_table, lengths, _LATENT, *plan, softmax_scale=scale, causal=True
    )
    return output.flatten(0, 1)


def _fits(q: tuple[Tensor, ...], latents: Tensor, keys: Tensor, tokens: int) -> bool:
    """Return whether sizes suit the package, and latents lie in memory beside their keys."""
    dtype, (P, K, page, _) = q[0].dtype, latents.shape
    return (
        dtype in _FLOATS
        and [x.shape[-1] for x in q] == [_LATENT, _ROTATED]
        and all(x.dtype == dtype for x in (q[1], latents, keys))
        and latents.shape == (P, 1, page, _LATENT)
        and keys.shape == (P, K, page, _ROTATED)
        and page % _PAGE == 0
        and latents.stride() == keys.stride()
        and latents.stride()[2:] == (_WIDTH, 1)
        and latents.stride(0) % (_PAGE * _WIDTH) == 0
        and keys.data_ptr() - latents.data_ptr() == _LATENT * latents.itemsize
        # As many tokens of each sequence.
        and len(q[0]) == tokens > 0
    )


BACKEND = Backend(
    name="flash-mla",
    device="cuda",
    implementations={
        "attention over pages": (
            Implementation(attend_pages, frozenset(_FLOATS), "latents of 512 and 64 in steps"),
        )
    },
    missing=lacking("flash_mla", 90, 90),
    on_request=True,
)
