"""Parsing and checks of a forward's inputs."""

import torch
from torch import Tensor

from quintet.cache import Cache, LegacyCache, Segment, from_legacy
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError, named
from quintet.ops.masks import causal_mask
from quintet.ops.ragged import check_ones_and_zeros
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
    past.fit(config, None if _autocast(embeds.device.type) else embeds.dtype)
    return past


def check_embeds(embeds: Tensor, width: int, dtype: torch.dtype) -> None:
    """Check that vectors (B, T, C) can go through layers of a width and dtype.

    Raises:
        InputError: they cannot.
    """
    if not isinstance(embeds, Tensor):
        raise InputError(f"inputs_embeds is a {type(embeds).__name__}; it has to be a tensor")
    if embeds.ndim != 3 or embeds.shape[-1] != width or embeds.numel() == 0:
        raise InputError(
            f"inputs_embeds has shape {tuple(embeds.shape)}; it has to be "
            f"(batch, tokens, {width}) with at least one token"
        )
    # What is narrower is widened by the first layer's norm.
    fits = embeds.is_floating_point() and torch.promote_types(embeds.dtype, dtype) == dtype
    if not (fits or (embeds.is_floating_point() and _autocast(embeds.device.type))):
        raise InputError(
            f"inputs_embeds has dtype {embeds.dtype} and the model computes in {dtype}; give "
            f"inputs_embeds.to({dtype})"
        )


def _autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def split_mask(mask: Tensor | None, B: int, T: int) -> tuple[Tensor | None, Tensor | None]:
    """Return (padding mask (B, W) or None, custom mask (B, H, T, S) or None)."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise InputError(f"attention_mask is a {type(mask).__name__}; it has to be a tensor")
    if mask.is_complex():
        raise InputError(f"attention_mask has dtype {mask.dtype}; it has to be real numbers")
    if mask.ndim == 2 and mask.shape[0] == B and mask.shape[1] >= T:
        check_ones_and_zeros(mask)
        return mask, None
    if mask.ndim == 4 and mask.shape[0] in (1, B) and mask.shape[2] == T:
        if mask.is_floating_point():
            return None, mask
        check_ones_and_zeros(mask)
        return None, mask.to(torch.bool)
    raise InputError(
        f"attention_mask has shape {tuple(mask.shape)}; it has to be ({B}, {T}), "
        f"({B}, past + {T}) with a cache, or ({B}, 1, {T}, keys)"
    )


def check_custom(mask: Tensor, heads: int, keys: int) -> None:
    """Check that a mask (B, H, T, S) is of all heads or of each, and of the keys there are.

    Raises:
        InputError: it is not.
    """
    if mask.shape[-1] != keys:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; its last axis has to be "
            f"{keys}, the keys there are with those in the cache"
        )
    if mask.shape[1] not in (1, heads):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; its second axis has to be 1, or "
            f"{heads} for the heads"
        )


def positions(position_ids: Tensor, B: int, T: int) -> Tensor:
    """Return position_ids as (B, T).

    Raises:
        InputError: they are not integers, or of another shape.
    """
    fits = isinstance(position_ids, Tensor) and position_ids.shape in ((T,), (1, T), (B, T))
    if not fits or not _whole(position_ids):
        raise InputError(
            f"position_ids is {_described(position_ids)}; it has to be integers of shape ({B}, {T})"
        )
    return position_ids.reshape(-1, T).expand(B, T)


def _whole(numbers: Tensor) -> bool:
    dtype = numbers.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {type(value).__name__}"


def check_past(cache: Cache, mask: Tensor | None, B: int, T: int) -> None:
    """Check that a mask of past and new tokens covers the cache.

    Raises:
        InputError: it does not.
    """
    if mask is None or mask.shape[1] == T or torch.compiler.is_compiling():
        return
    counted = mask[:, :-T].to(torch.bool).sum(dim=1)
    cached = cache.lengths(B, counted.device)
    if not torch.equal(counted, cached):
        raise InputError(
            f"attention_mask counts {counted.tolist()} tokens before the new {T}, and the cache "
            f"holds {cached.tolist()}; pass the mask of all tokens so far, or of the new ones alone"
        )


def first_position(cache_position: Tensor, T: int) -> Tensor:
    """Return the first slot of T new tokens, a scalar.

    Raises:
        InputError: they are not T slots in a row.
    """
    fits = isinstance(cache_position, Tensor) and cache_position.shape == (T,)
    if not fits or not _whole(cache_position):
        raise InputError(
            f"cache_position is {_described(cache_position)}; it has to be integers of shape "
            f"({T},), a slot for each new token"
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
