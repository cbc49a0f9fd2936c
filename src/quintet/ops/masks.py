"""Attention masks, decided by the slots of queries and keys."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.ops.transforms import recorded
from quintet.triton.pages import Pages

# A mask of more entries is made for some of the queries at a time.
MOST_ENTRIES = 2**23


@dataclass(frozen=True, slots=True)
class AttentionMask:
    """The keys visible to the queries of a forward, for all layers of a kind.

    Attributes:
        entries: (B or 1, H or 1, T, S), True where a query sees a key, or a float to add to the
            scores; None if `is_causal` says it all, every key is seen, or `slots` are given.
        is_causal: query i of T sees keys 0..i of S = T.
        start: the first query's slot, one for all rows or (B,).
        window: how many keys, its own included, a query sees at the most; None for no limit.
        custom: the entries are the caller's own, not one that `start` and `window` describe.
        slots: (B or 1, T), the slots of queries whose entries would be too large to have at once.
        pages: where the keys of each row lie, told on the device; None if that is not known.
    """

    entries: Tensor | None
    is_causal: bool
    start: int | Tensor
    window: int | None
    custom: bool = False
    slots: Tensor | None = None
    pages: Pages | None = None

    def keys_of(self, first: int, last: int, S: int) -> tuple[int, int]:
        """Return the range of keys, of S, visible to queries `first` to `last`."""
        start = self.start
        if isinstance(start, Tensor) and start.is_meta:
            return 0, S
        least, most = (start,) * 2 if isinstance(start, int) else (start.min(), start.max())
        begin = 0 if self.window is None else max(0, int(least) + first - self.window + 1)
        return begin, min(S, int(most) + last)


def causal_mask(slots: Tensor, S: int, window: int | None, *, begin: int = 0) -> Tensor:
    """Return (B, 1, T, S): key slot s is seen from slot t when t - window < s <= t.

    Shapes: slots (B, T), the slot of each query. Only the keys from `begin` on are looked at.
    """
    keys = torch.arange(begin, S, dtype=torch.long, device=slots.device)
    # Compared, not subtracted: a difference of all pairs takes eight times the memory.
    seen = keys <= slots[:, :, None]  # (B, T, S)
    if window is not None:
        seen &= keys > slots[:, :, None] - window
    return seen[:, None]


def masked(scores: Tensor, mask: AttentionMask) -> Tensor:
    """Lower the scores (B, H, T, S) of invisible keys."""
    T, S = scores.shape[-2:]
    entries = mask.entries
    if mask.is_causal:
        places = torch.arange(T, dtype=torch.long, device=scores.device)
        entries = causal_mask(places[None], S, None)
    elif mask.slots is not None:
        entries = causal_mask(mask.slots, S, mask.window)
    if entries is None:
        return scores
    if entries.dtype == torch.bool:
        # The lowest finite number, not -inf: a row that sees nothing stays finite.
        return scores.masked_fill(~entries, torch.finfo(scores.dtype).min)
    return scores + entries.to(scores.dtype)


def attention_mask_of(
    slots: Tensor, start: int | Tensor, S: int, window: int | None, custom: Tensor | None = None
) -> AttentionMask:
    """Describe which of S keys T queries at `slots` (B or 1, T) see."""
    if custom is not None:
        return AttentionMask(custom, False, start, window, custom=True)
    T = slots.shape[1]
    if isinstance(start, int):
        end = start + T
        if window is not None and end <= window:
            window = None
        if window is None and end == S and (T == 1 or start == 0):
            return AttentionMask(None, T > 1, start, None)
    # A program that is recorded once has to serve other lengths, and has no loops over them.
    if not recorded() and T > 1 and slots.numel() * S > MOST_ENTRIES:
        return AttentionMask(None, False, start, window, slots=slots)
    return AttentionMask(causal_mask(slots, S, window), False, start, window)
