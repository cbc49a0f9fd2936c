"""The legacy tuple format: one (keys, values) per layer, with padding columns."""

import torch
from torch import Tensor

from quintet.cache.base import Cache
from quintet.cache.dense import DynamicCache
from quintet.errors import InputError
from quintet.ops.ragged import ragged

LegacyCache = tuple[tuple[Tensor, Tensor], ...]


def from_legacy(past: LegacyCache, mask: Tensor | None, num_hidden_layers: int) -> Cache:
    """Build a cache from tuples of (B, K, P, D); `mask` (B, P) marks the tokens.

    Raises:
        InputError: the tuples are not of the model's layers, or not of one shape.
    """
    if len(past) != num_hidden_layers:
        raise InputError(
            f"past_key_values has {len(past)} layers and the model {num_hidden_layers}"
        )
    _check_shapes(past, mask)
    cache = DynamicCache(num_hidden_layers=num_hidden_layers)
    first = past[0][0]
    rows = None if mask is None else ragged(mask)
    segment = cache.segment(
        first.shape[0], first.shape[2], first.device, None if rows is None else rows.counts
    )
    for index, pair in enumerate(past):
        keys, values = pair
        if rows is not None:
            keys, values = (rows.pack(x.transpose(1, 2)).transpose(1, 2) for x in pair)
        cache.update(keys, values, index, segment)
    cache.advance(segment)
    return cache


def to_legacy(cache: Cache, mask: Tensor | None) -> LegacyCache:
    """Return tuples of (B, K, W, D), with tokens in the columns that `mask` (B, W) marks."""
    rows = None if mask is None else ragged(mask)
    if rows is None or mask is None:
        return tuple(cache)
    slots = (mask.to(torch.bool).cumsum(dim=1) - 1).clamp(min=0)[:, None, :, None]

    def spread(x: Tensor) -> Tensor:
        index = slots.clamp(max=x.shape[2] - 1).expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)

    return tuple((spread(keys), spread(values)) for keys, values in cache)


def _check_shapes(past: LegacyCache, mask: Tensor | None) -> None:
    for index, pair in enumerate(past):
        if not isinstance(pair, tuple | list) or not all(isinstance(x, Tensor) for x in pair):
            raise InputError(
                f"past_key_values[{index}] is a {type(pair).__name__}; it has to be a pair of "
                "tensors, keys and values"
            )
    shapes = [tuple(x.shape) for pair in past for x in pair]
    shape = shapes[0] if shapes else ()
    for index, pair in enumerate(past):
        if len(pair) != 2 or any(x.ndim != 4 or x.shape[:3] != shape[:3] for x in pair):
            raise InputError(
                f"past_key_values[{index}] holds {[tuple(x.shape) for x in pair]}; it has to be "
                "keys and values of shape (batch, heads, tokens, size), alike in all layers"
            )
    if mask is not None and mask.shape != (shape[0], shape[2]):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)} before the new tokens, and "
            f"past_key_values {shape[0]} rows of {shape[2]} columns"
        )
