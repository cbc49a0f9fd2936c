"""Parsing and checks of a forward's inputs."""

import torch
from torch import Tensor

from quintet.cache import Cache, LegacyCache, Segment, from_legacy
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError, named
from quintet.ops.masks import causal_mask
from quintet.ops.transforms import recorded

# What is added to a score to hide its key.
LOW = -30_000.0
NOT_CAUSAL = (
    "attention_mask has 4 axes and is not the causal one, which layers with recurrent states "
    "cannot obey; mark padding by a mask (batch, tokens), and texts in a row by position_ids or "
    "seq_idx"
)


def opened(
    past: Cache | LegacyCache, mask: Tensor | None, embeds: Tensor, config: PreTrainedConfig
) -> Cache:
    """Return the cache for new tokens, embedded as (B, T, C).

    Raises:
        InputError: it is none, or of another model.
    """
    T = embeds.shape[1]
    if isinstance(past, tuple):
        seen = mask[:, :-T] if mask is not None and mask.shape[1] > T else None
        past = from_legacy(past, seen, config.num_hidden_layers)
    if not isinstance(past, Cache):
        raise InputError(
            f"past_key_values is a {named(past)}; it has to be a Cache, or a tuple of "
            "(keys, values) for each layer"
        )
    # Autocast computes keys in a dtype of its own.
    device = embeds.device.type
    chosen = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    past.fit(config, None if chosen else embeds.dtype)
    return past


def split_mask(mask: Tensor | None, B: int, T: int) -> tuple[Tensor | None, Tensor | None]:
    """Return (padding mask (B, W) or None, custom mask (B, H, T, S) or None)."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise InputError(f"attention_mask is a {type(mask).__name__}; it has to be a tensor")
    if mask.ndim == 2 and mask.shape[0] == B and mask.shape[1] >= T:
        return mask, None
    if mask.ndim == 4 and mask.shape[0] in (1, B) and mask.shape[2] == T:
        return None, mask if mask.is_floating_point() else mask.to(torch.bool)
    raise InputError(
        f"attention_mask has shape {tuple(mask.shape)}; it has to be ({B}, {T}), "
        f"({B}, past + {T}) with a cache, or ({B}, 1, {T}, keys)"
    )


def positions(position_ids: Tensor, B: int, T: int) -> Tensor:
    """Return position_ids as (B, T).

    Raises:
        InputError: they are not integers, or of another shape.
    """
    fits = isinstance(position_ids, Tensor) and position_ids.shape in ((T,), (1, T), (B, T))
    if not fits or position_ids.is_floating_point():
        raise InputError(
            f"position_ids is {_described(position_ids)}; it has to be integers of shape ({B}, {T})"
        )
    return position_ids.reshape(-1, T).expand(B, T)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {type(value).__name__}"


def check_past(cache: Cache, mask: Tensor | None, B: int, T: int) -> None:
    """Check that a mask of past and new tokens covers what the cache holds.

    Raises:
        InputError: it does not.
    """
    if mask is None or mask.shape[1] == T or torch.compiler.is_compiling():
        return
    counted = mask[:, :-T].to(torch.bool).sum(dim=1)
    held = cache.lengths(B, counted.device)
    if not torch.equal(counted, held):
        raise InputError(
            f"attention_mask counts {counted.tolist()} tokens before the new {T}, and the cache "
            f"holds {held.tolist()}; pass the mask of all tokens so far, or of the new ones alone"
        )


def first_position(cache_position: Tensor, T: int) -> Tensor:
    """Return the first slot of T new tokens, a scalar.

    Raises:
        InputError: they are not T slots in a row.
    """
    if cache_position.shape != (T,):
        raise InputError(
            f"cache_position has shape {tuple(cache_position.shape)}; it has to be ({T},), "
            "a slot for each new token"
        )
    if not torch.compiler.is_compiling():
        steps = cache_position - cache_position[0]
        if not torch.equal(steps, torch.arange(T, device=steps.device, dtype=torch.long)):
            raise InputError(
                f"cache_position={cache_position.tolist()} has to be consecutive slots"
            )
    return cache_position[0]


def check_causal(mask: Tensor, segment: Segment) -> None:
    """Check that a custom mask (B, H, T, S) is causal: recurrent states allow no other.

    Raises:
        InputError: it is another.
    """
    seen = causal_mask(segment.slots(), segment.keys, None)
    hides = ~mask if mask.dtype == torch.bool else mask < LOW
    shows = mask if mask.dtype == torch.bool else mask == 0
    plain = torch.where(seen, shows, hides).all()
    if recorded():
        torch._assert_async(plain, NOT_CAUSAL)
    elif not bool(plain):
        raise InputError(NOT_CAUSAL)
