"""What all layers of one forward share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quintet.cache import Cache, Span
from quintet.ops.attention import AttentionBackend
from quintet.ops.documents import Attend, Documents
from quintet.ops.masks import Visibility

__all__ = ["Notes", "Step"]


class Notes:
    """What layers tell, in their order, beside the hidden states they return.

    Layers return hidden states alone, as those of Transformers do, so that whoever hooks them
    meets the same here.

    Attributes:
        weights: (B, H, T, S) of attention, where the backend has them; None if nobody asked.
        router_logits: (B, T, E) of experts; None if nobody asked.
    """

    def __init__(self, *, weights: bool = False, router_logits: bool = False) -> None:
        self.weights: list[Tensor] | None = [] if weights else None
        self.router_logits: list[Tensor] | None = [] if router_logits else None

    def note_weights(self, weights: Tensor | None) -> None:
        """Take a layer's weights, if somebody asked."""
        if self.weights is not None and weights is not None:
            self.weights.append(weights)

    def note_routing(self, logits: Tensor) -> None:
        """Take what a layer's router made, if somebody asked."""
        if self.router_logits is not None:
            self.router_logits.append(logits)

    def extend(self, others: "Notes") -> None:
        """Take what was noted elsewhere."""
        for weights in others.weights or ():
            self.note_weights(weights)
        for logits in others.router_logits or ():
            self.note_routing(logits)

    def like(self) -> "Notes":
        """Return empty notes of what is asked for here."""
        weighs, routes = self.weights is not None, self.router_logits is not None
        return Notes(weights=weighs, router_logits=routes)


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
        texts: the texts that rows hold; None where one each.
        notes: where layers put what was asked for beside their output.
        elsewhere: the same step on other devices, which layers there share.
    """

    cos: Tensor
    sin: Tensor
    seen: Mapping[int | None, Visibility]
    attend: AttentionBackend
    span: Span
    cache: Cache | None
    embeds: Tensor
    notes: Notes = field(default_factory=Notes)
    texts: Documents | None = None
    elsewhere: "dict[torch.device, Step]" = field(init=False, default_factory=dict, repr=False)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by the backend, each text of the rows by itself."""

        def attend(seen: Visibility, *qkv: Tensor) -> tuple[Tensor, Tensor | None]:
            q, k, v = qkv
            return self.attend(q, k, v, seen, scale=scale, dropout=dropout)

        return self.by_text(attend, window, q, k, v)

    def by_text(
        self, attend: Attend, window: int | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what a function of visibility and (B, H, T, ...) makes of each text."""
        within = attend if self.texts is None else self.texts.attention(attend)
        return within(self.seen[window], *tensors)
