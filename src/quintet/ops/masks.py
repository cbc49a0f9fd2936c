"""Which keys a query sees, decided by the slots that both take in their row."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Visibility", "causal_mask", "visibility"]


@dataclass(frozen=True, slots=True)
class Visibility:
    """What one forward's queries see of the keys; the same for every layer of a kind.

    Attributes:
        mask: (B or 1, H or 1, T, S), True where a query sees a key, or a float to add to the
            scores; None where `is_causal` says it all, or every key is seen.
        is_causal: query i of T sees keys 0..i of S = T.
        start: the first query's slot, one for all rows or (B,).
        window: how many keys, its own included, a query sees at the most; None for no limit.
        custom: the mask is the caller's own, not one that `start` and `window` describe.
    """

    mask: Tensor | None
    is_causal: bool
    start: int | Tensor
    window: int | None
    custom: bool = False


def causal_mask(slots: Tensor, S: int, window: int | None) -> Tensor:
    """Return (B, 1, T, S): key slot s is seen from slot t when t - window < s <= t.

    Shapes: slots (B, T), the slot of each query.
    """
    keys = torch.arange(S, dtype=torch.long, device=slots.device)
    distance = slots[:, :, None] - keys  # (B, T, S)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[:, None]


def visibility(
    slots: Tensor, start: int | Tensor, S: int, window: int | None, custom: Tensor | None = None
) -> Visibility:
    """Describe what T queries at `slots` (B or 1, T) see of S keys, with a mask only if needed."""
    if custom is not None:
        return Visibility(custom, False, start, window, custom=True)
    T = slots.shape[1]
    if isinstance(start, int):
        end = start + T
        if window is not None and end <= window:
            window = None
        if window is None and end == S and (T == 1 or start == 0):
            return Visibility(None, T > 1, start, None)
    return Visibility(causal_mask(slots, S, window), False, start, window)
