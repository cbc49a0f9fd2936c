"""Attention over paged keys and values, with lengths only the device knows.

The tokens of all sequences stand in one packed row of N. What is kept of a sequence lies in pages,
of which a table says which are its own and in what order; where memory is rows, a page is a row.
Nothing here reads a length on the host, so that a step can be recorded once and run at any lengths.

Shapes: q (N, H, D), memory (P, K, page, D) with H a multiple of K.
"""

import torch
from torch import Tensor

from quintet.backends import operation
from quintet.ops.masks import AttentionMask
from quintet.ops.vector_codes import VectorCode
from quintet.triton.pages import Coded, Memory, Pages


@operation("attention over pages")
def attend_pages(
    q: tuple[Tensor, ...],
    k: tuple[Memory, ...],
    v: Memory | None,
    pages: Pages,
    *,
    window: int | None,
    scale: float,
) -> Tensor:
    """Return softmax(q·kᵀ·scale)·v, (N, H, Dv), of each token over its sequence's pages.

    A token sees the slots up to its own, at most the last `window` of them; with none to see, it
    gets zeros. Queries and keys come in one part or two, as if joined along the last axis; a part
    of the keys with one head is shared by all. Without `v`, the first part of the keys is it, as
    latents are.
    """
    N, H, _ = q[0].shape
    n, T = len(pages.starts), pages.most
    wide = torch.promote_types(q[0].dtype, torch.float32)
    index, slots = pages.of_tokens(N)
    within = (slots - pages.starts[index.clamp(max=n - 1)]).clamp(max=T - 1)
    query_slots = torch.zeros(n + 1, T, dtype=torch.long, device=slots.device)
    query_slots[index, within] = slots
    keys = [_gather(x, pages, q[0].dtype).to(wide) for x in k]
    values = keys[0] if v is None else _gather(v, pages, q[0].dtype).to(wide)
    scores = torch.zeros(n, H, T, pages.longest, dtype=wide, device=slots.device)
    for of_q, of_k in zip(q, keys, strict=True):
        padded = of_q.new_zeros(n + 1, T, *of_q.shape[1:], dtype=wide)
        padded[index, within] = of_q.to(wide)
        heads = of_k.repeat_interleave(H // of_k.shape[1], dim=1)
        scores += padded[:n].transpose(1, 2) @ heads.transpose(2, 3)
    slot = torch.arange(pages.longest, dtype=torch.long, device=slots.device)
    seen = slot <= query_slots[:n, :, None]  # (n, T, S)
    if window is not None:
        seen &= slot > query_slots[:n, :, None] - window
    seen &= _filled(pages, slot, _page(k[0]))[:, None]
    scores = (scores * scale).masked_fill(~seen[:, None], torch.finfo(wide).min)
    weights = scores.softmax(dim=-1) * seen[:, None]
    output = weights @ values.repeat_interleave(H // values.shape[1], dim=1)  # (n, H, T, Dv)
    own = output.transpose(1, 2)[index.clamp(max=n - 1), within]
    return (own * (index < n)[:, None, None]).to(q[0].dtype)


def attend_rows(
    q: tuple[Tensor, ...],
    k: tuple[Tensor, ...],
    v: Tensor | None,
    mask: AttentionMask,
    *,
    scale: float,
) -> Tensor | None:
    """Return softmax(q·kᵀ·scale)·v, (B, H, T, Dv), of rows whose mask has pages, or None.

    None if no backend does that.

    Shapes: q (B, H, T, D) and k (B, K or 1, S, D), in one part or two; v (B, K, S, Dv), or None
    where the first part of the keys is it.
    """
    assert mask.pages is not None
    B, _, T, _ = q[0].shape
    flat = tuple(x.transpose(1, 2).flatten(0, 1) for x in q)
    output = attend_pages.by_backend(flat, k, v, mask.pages, window=mask.window, scale=scale)
    return None if output is None else torch.unflatten(output, 0, (B, T)).transpose(1, 2)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, pages: Pages, *, window: int | None, scale: float
) -> Tensor | None:
    """Return softmax(q·kᵀ·scale)·v, (B, H, T, Dv), of rows that are packed; None as above.

    Shapes: q (B, H, T, D), the tokens of all sequences; k and v as above.
    """
    B, _, T, _ = q.shape
    flat = q.transpose(1, 2).flatten(0, 1)
    output = attend_pages.by_backend((flat,), (k,), v, pages, window=window, scale=scale)
    return None if output is None else torch.unflatten(output, 0, (B, T)).transpose(1, 2)


def _page(memory: Memory) -> int:
    return (memory.codes if isinstance(memory, Coded) else memory).shape[2]


def _filled(pages: Pages, slot: Tensor, page: int) -> Tensor:
    """Return a mask (n, S) of the filled slots of each sequence."""
    counts = pages.ends.diff()
    filled = slot < (pages.starts + counts)[:, None]
    if pages.table is None:
        return filled
    sequence = torch.arange(len(counts), dtype=torch.long, device=slot.device)[:, None]
    number, _ = pages.place(sequence, slot[None], page)
    return filled & (number >= 0)


def _gather(memory: Memory, pages: Pages, dtype: torch.dtype) -> Tensor:
    """Gather (n, K, S, D) from the pages, zeros where nothing is kept."""
    if isinstance(memory, Coded):
        memory = VectorCode(memory.bits).decode(memory.codes, memory.scales, dtype)
    slot = torch.arange(pages.longest, dtype=torch.long, device=memory.device)
    sequence = torch.arange(len(pages.starts), dtype=torch.long, device=memory.device)[:, None]
    number, place = pages.place(sequence, slot[None], memory.shape[2])
    gathered = memory[number.clamp(min=0), :, place.clamp(max=memory.shape[2] - 1)]  # (n, S, K, D)
    filled = _filled(pages, slot, memory.shape[2])[:, :, None, None]
    # Memory that nobody wrote may hold anything, and a weight of 0 times NaN would still be NaN.
    return torch.where(filled, gathered, 0).transpose(1, 2)
