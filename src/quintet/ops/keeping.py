"""Rotates a token's keys and writes them to their sequence's place, in one pass.

Between the maps of attention and attention itself, a token's query and key are rotated, its latent
is normalised, and what is kept of it is written to its slot: of few tokens, ten small steps.
Axis letters as in `quintet.ops.paged`.
"""

import torch
from torch import Tensor

from quintet.backends import operation
from quintet.ops.norm import rms_norm
from quintet.ops.rope import rotate_parts
from quintet.triton.pages import Pages


@operation("rotate and keep")
def rotate_and_keep(
    q: Tensor,
    k: Tensor,
    other: Tensor,
    cos: Tensor,
    sin: Tensor,
    memory: tuple[Tensor, Tensor],
    pages: Pages,
    *,
    norm: tuple[Tensor, float] | None,
    interleaved: bool,
) -> Tensor:
    """Return rotated queries (N, H, D), and write keys, rotated too, and the other part to slots.

    The other part is values, or with `norm` latents that are normalised first. A token that is
    nowhere leaves nothing.

    Shapes: q (N, H, D), k (N, K, D), other (N, K, E); cos and sin (N, D), whose halves are alike;
    memory (P, K, page, D) and (P, K, page, E).

    Args:
        norm: a weight (E) and an epsilon.
        interleaved: whether neighbours are rotated together, or i and i + D/2.
    """
    n, page = len(pages.starts), memory[0].shape[2]
    sequence, slot = pages.of_tokens(len(q))
    number, place = pages.place(sequence.clamp(max=n - 1), slot, page)
    real = (sequence < n) & (number >= 0)
    parts = tuple(x.transpose(0, 1)[None] for x in (q, k))
    turned, keys = (
        x[0].transpose(0, 1)
        for x in rotate_parts.definition(parts, cos[None], sin[None], neighbours=interleaved)
    )
    if norm is not None:
        other = rms_norm.definition(other, *norm)
    for buffer, new in zip(memory, (keys, other), strict=True):
        buffer[number[real], :, place[real]] = new[real]
    return turned


def keep_rows(
    q: Tensor,
    k: Tensor,
    other: Tensor,
    cos: Tensor,
    sin: Tensor,
    memory: tuple[Tensor, Tensor],
    pages: Pages,
    *,
    norm: tuple[Tensor, float] | None,
    interleaved: bool,
) -> Tensor | None:
    """Call `rotate_and_keep` for rows of equal length; return None if no backend serves it.

    Shapes: q and the rotated queries (B, H, T, D), k (B, K, T, D), other (B, K, T, E), cos and sin
    (B or 1, T, D).
    """
    B, _, T, _ = q.shape
    q, k, other = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, other))
    cos, sin = (x.expand(B, -1, -1).flatten(0, 1) for x in (cos, sin))
    turned = rotate_and_keep.by_backend(
        q, k, other, cos, sin, memory, pages, norm=norm, interleaved=interleaved
    )
    return None if turned is None else torch.unflatten(turned, 0, (B, T)).transpose(1, 2)
