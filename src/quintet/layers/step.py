"""What all layers of one forward share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from quintet.cache import Cache, Span
from quintet.ops.attention import AttentionBackend
from quintet.ops.masks import Visibility

__all__ = ["LayerOutput", "Step"]


class LayerOutput(NamedTuple):
    """What a decoder layer returns.

    Attributes:
        hidden_states: (B, T, C).
        attention: the weights (B, H, T, S), where the backend has them.
        router_logits: (B, T, E), where the layer has experts.
    """

    hidden_states: Tensor
    attention: Tensor | None = None
    router_logits: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One forward's positions, visibility and cache, worked out once for all layers.

    Attributes:
        cos: (B or 1, T, D) of the rotary angles, in the dtype of the activations.
        sin: the same.
        seen: what queries see, by the layer's window (None for full attention).
        attend: the attention backend.
        span: the slots the tokens take.
        cache: where layers keep what the next step needs; None to keep nothing.
        embeds: (B, T, C) the embeddings, for layers that look back at them.
    """

    cos: Tensor
    sin: Tensor
    seen: Mapping[int | None, Visibility]
    attend: AttentionBackend
    span: Span
    cache: Cache | None
    embeds: Tensor
