"""Small models and comparisons that several tests use."""

from typing import Any

import torch
import transformers
from torch import Tensor

from quintet import Qwen2Config

__all__ = ["SMALL", "relative_error", "small_config", "twins"]

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Larger than the default: weights so small that every token says the same would prove little.
    "initializer_range": 0.15,
}


def small_config(**changes: Any) -> Qwen2Config:
    """A Qwen2 small enough to run in milliseconds."""
    return Qwen2Config(**{**SMALL, **changes})


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    ours, theirs = ours.detach(), theirs.detach()
    scale = theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)
    return float((ours - theirs).abs().max() / scale)


def twins(name: str, changes: dict[str, Any], backend: str = "sdpa") -> tuple[Any, Any]:
    """A model of ours and one of Transformers, of the class `name`, with the same random weights.

    Norms and biases are random too: at their initial ones and zeros an error would not show.
    """
    import quintet

    values = {**SMALL, **changes}
    config = transformers.Qwen2Config(**{k: _copied(v) for k, v in values.items()})
    config._attn_implementation = "eager"
    theirs = getattr(transformers, name)(config).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    ours = getattr(quintet, name)(small_config(**changes, attn_implementation=backend)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
