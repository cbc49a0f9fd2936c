"""Segments, rotary angles and masks of a forward."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from quintet.cache import Cache, Segment, segments_of
from quintet.layers.rotary import RotaryEmbedding
from quintet.ops.documents import Documents
from quintet.ops.masks import AttentionMask, attention_mask_of, causal_mask
from quintet.ops.ragged import Padding, Ragged
from quintet.ops.sending import brought, sent
from quintet.triton.texts import Texts


def segments(
    embeds: Tensor, rows: Padding | Documents | None, cache: Cache | None, *, learns: bool
) -> tuple[Segment, tuple[Segment, ...]]:
    """Return the slots of the tokens in all rows of a cache, and their rectangles.

    Args:
        embeds: (B, T, C), or (1, N, C) of rows with unequally many.
        rows: what tells how many each has; None for T of each of B.
        cache: what they continue.
        learns: whether a graph of autograd may hold on to what is attended to.

    Raises:
        InputError: the cache holds another number of rows.
        ContextLengthError: a preallocated cache has no room for them.
    """
    B, T, _ = embeds.shape
    lengths, counts, device = None, None, embeds.device
    if isinstance(rows, Ragged):
        counts = rows.counts
    elif rows is not None and rows.lengths is not None:
        lengths = rows.lengths
        B, T = len(lengths), max(lengths)
        # What a pool knows of its rows it need not ask a device for.
        counts = torch.tensor(lengths, dtype=torch.long, device="cpu")
    if cache is None:
        whole = Segment(0, T, T, None if counts is None else brought(counts, device), device)
    else:
        whole = replace(cache.segment(B, T, device, counts), learns=learns)
    return whole, (whole,) if lengths is None else segments_of(whole, lengths)


def texts_of(segments: Sequence[Segment]) -> Texts | None:
    """Return the cache row of each token of a packed row; None for a rectangle.

    All of it is known to the host, which sends it and does not wait.
    """
    lengths: list[int] = []
    rows: list[int] = []
    for one in segments:
        if one.rows is None:
            return None
        rows += range(one.rows.start, one.rows.stop)
        lengths += [one.length] * (one.rows.stop - one.rows.start)
    as_tensor = partial(sent, dtype=torch.int32, device=segments[0].device)
    everyone = len(rows) == segments[0].batch
    ends = as_tensor([*accumulate(lengths, initial=0)])
    return Texts(len(rows), max(lengths), ends, None if everyone else as_tensor(rows))


def angles(
    rotary: RotaryEmbedding,
    segments: Sequence[Segment],
    positions: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of all tokens, (B or 1, T, D), computed per segment.

    Some depend on how long a row is.

    Args:
        positions: (B, T) of the tokens; None for their slots.
    """
    first = segments[0]
    if first.tokens is None:
        if positions is None and isinstance(first.start, int):
            return rotary.following(first.start, first.length, dtype)
        cos, sin = rotary(first.slots() if positions is None else positions)
        return cos.to(dtype), sin.to(dtype)
    rotations = []
    for segment in segments:
        if positions is not None:
            own = torch.unflatten(positions.flatten()[segment.tokens], 0, (-1, segment.length))
        else:
            assert segment.rows is not None
            own = segment.slots().expand(segment.rows.stop - segment.rows.start, -1)
        rotations.append([x.flatten(0, 1) for x in rotary(own)])
    cos, sin = (torch.cat(kind).to(dtype) for kind in zip(*rotations, strict=True))
    B = 1 if positions is None else len(positions)
    return torch.unflatten(cos, 0, (B, -1)), torch.unflatten(sin, 0, (B, -1))


def masks(
    segments: Sequence[Segment],
    windows: Collection[int | None],
    custom: Tensor | None,
    texts: Documents | None,
) -> tuple[dict[int | None, AttentionMask], ...]:
    """Return each segment's attention masks, by window.

    Args:
        custom: (B, H, T, S), the caller's own mask.
        texts: what a program that is recorded for any texts separates by entries.

    """
    seen = []
    for one in segments:
        slots = one.slots()
        if one.same is not None:
            entries = {w: causal_mask(slots, one.keys, w) & one.same[:, None] for w in windows}
            apart = {
                w: AttentionMask(e, False, one.start, w, custom=True) for w, e in entries.items()
            }
            seen.append(apart)
            continue
        own = {w: attention_mask_of(slots, one.start, one.keys, w, custom) for w in windows}
        if texts is not None and texts.lengths is None:
            own = {window: texts.masked(mask, slots) for window, mask in own.items()}
        if one.pages is not None and custom is None:
            own = {window: replace(mask, pages=one.pages) for window, mask in own.items()}
        seen.append(own)
    return tuple(seen)
