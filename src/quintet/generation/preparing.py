"""Arguments of the next forward, for external decode loops."""

from typing import Any

import torch
from torch import Tensor

from quintet.cache import Cache, LegacyCache


def next_inputs(
    input_ids: Tensor,
    past: Cache | LegacyCache | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    new: int | None,
) -> dict[str, Any]:
    """Return the forward's arguments for a text (B, T) and its cache.

    Args:
        input_ids: (B, T) all ids so far.
        past: what holds the beginning of the text.
        attention_mask: (B, T), 0 for padding; or with what came before the ids in front.
        inputs_embeds: (B, T, C) in place of ids while there is no past.
        new: how many of the last columns to run over; what the cache does not hold if not given.
    """
    T = input_ids.shape[1]
    inputs: dict[str, Any] = {"past_key_values": past, "attention_mask": attention_mask}
    if new is None:
        new = T if past is None else _behind(past, input_ids, attention_mask)
    if inputs_embeds is not None and not _held(past, input_ids).any():
        return {"input_ids": None, "inputs_embeds": inputs_embeds[:, -new:], **inputs}
    return {"input_ids": input_ids[:, -new:].contiguous(), **inputs}


def _behind(past: Cache | LegacyCache, input_ids: Tensor, mask: Tensor | None) -> int:
    """Return the largest number of columns the cache lacks in any row."""
    tokens = input_ids.shape[1] if mask is None else mask.to(torch.bool).sum(dim=1)
    # It may hold more than the ids, where what came before them was none.
    return max(1, int((tokens - _held(past, input_ids)).max()))


def _held(past: Cache | LegacyCache | None, input_ids: Tensor) -> Tensor:
    """Return the number of tokens of each row in the cache."""
    B = input_ids.shape[0]
    if isinstance(past, Cache):
        return past.lengths(B, input_ids.device)
    return input_ids.new_full((B,), past[0][0].shape[-2] if past else 0)
