"""Caches of Transformers, taken over where both hold keys and values of the same shape."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from quintet.cache import from_legacy
from quintet.errors import InputError
from quintet.modeling.base import PreTrainedModel


def taking_caches(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a forward take Transformers' caches: it copies them, and returns a cache of ours."""

    @functools.wraps(forward)
    def run(model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
        from transformers import Cache as TransformersCache

        past = inputs.get("past_key_values")
        if isinstance(past, TransformersCache):
            inputs["past_key_values"] = _taken(model, past, args, inputs)
        return forward(model, *args, **inputs)

    return run


def continuing_caches(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Make `generate()` take Transformers' caches: it copies them, and fills a cache of ours."""

    @functools.wraps(generate)
    def run(model: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
        from transformers import Cache as TransformersCache

        past = inputs.get("past_key_values")
        if isinstance(past, TransformersCache):
            mask: Tensor | None = inputs.get("attention_mask")
            seen = None if mask is None else mask[:, : past.get_seq_length()]
            inputs["past_key_values"] = _copied(model, past, seen)
        return generate(model, *args, **inputs)

    return run


def _taken(model: PreTrainedModel, past: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
    """Copy the cache's content before the new tokens of a forward."""
    ids = args[0] if args else inputs.get("input_ids")
    new: Tensor = inputs["inputs_embeds"] if ids is None else ids
    mask: Tensor | None = args[1] if len(args) > 1 else inputs.get("attention_mask")
    length = new.shape[1]
    padded = mask is not None and mask.ndim == 2 and mask.shape[1] > length
    return _copied(model, past, mask[:, :-length] if mask is not None and padded else None)


def _copied(model: PreTrainedModel, past: Any, seen: Tensor | None) -> Any:
    """Copy the content of their cache into one of ours, or return None if it is empty.

    Args:
        seen: which of its columns are tokens; all if None.

    Raises:
        InputError: the family keeps something else between steps than keys and values.
    """
    if not past.get_seq_length():
        return None
    pairs = tuple((layer.keys, layer.values) for layer in past.layers)
    per_token, per_row = model.config.cache_numbers()
    theirs = sum(x.shape[1] * x.shape[3] for pair in pairs for x in pair)
    if per_row or theirs != per_token:
        raise InputError(
            f"past_key_values is a {type(past).__module__}.{type(past).__name__} of {theirs} "
            f"numbers a token; {type(model).__name__} keeps {per_token}, and {per_row} a row: "
            "such caches cannot be exchanged. Run the text again without one"
        )
    return from_legacy(pairs, seen, model.config.num_hidden_layers)
