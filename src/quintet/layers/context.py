"""The context that all layers of one forward share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.cache import Cache, Segment
from quintet.layers.adapted import Placing, placed
from quintet.layers.router import Choices
from quintet.ops.attention import AttentionBackend, sdpa
from quintet.ops.causal_learning import attend_learning, attends_learning
from quintet.ops.keeping import keep_rows
from quintet.ops.masks import AttentionMask
from quintet.ops.paged import attend_packed
from quintet.triton.texts import Texts


class Notes:
    """Collects the layers' further results beside hidden states, in their order.

    Layers return hidden states alone, as those of Transformers do, so that whoever hooks them
    meets the same here.

    Attributes:
        weights: (B, H, T, S) of attention, where the backend has them; None if nobody asked.
        router_logits: (B, T, E) of experts; None if nobody asked.
        choices: what routers choose, where they may have to choose it again; else None.
    """

    def __init__(self, *, weights: bool = False, router_logits: bool = False) -> None:
        self.weights: list[Tensor] | None = [] if weights else None
        self.router_logits: list[Tensor] | None = [] if router_logits else None
        self.choices: Choices | None = None

    def note_weights(self, weights: Tensor | None) -> None:
        """Append a layer's attention weights, if requested."""
        if self.weights is not None and weights is not None:
            self.weights.append(weights)

    def note_routing(self, logits: Tensor) -> None:
        """Append a layer's router logits, if requested."""
        if self.router_logits is not None:
            self.router_logits.append(logits)

    def extend(self, others: "Notes") -> None:
        """Append the notes of another."""
        for weights in others.weights or ():
            self.note_weights(weights)
        for logits in others.router_logits or ():
            self.note_routing(logits)

    def like(self) -> "Notes":
        """Return empty notes that collect the same."""
        weighs, routes = self.weights is not None, self.router_logits is not None
        return Notes(weights=weighs, router_logits=routes)


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Positions, masks and cache of one forward, computed once for all layers.

    Its tokens are one rectangle (B, T) of rows, or N of rows with unequally many. Then hidden
    states are (1, N, C), and what mixes tokens does so segment by segment.

    Attributes:
        cos: (B or 1, T, D) of the rotary angles, in the dtype of the activations.
        sin: the same.
        whole: the slots that the tokens of all rows take.
        segments: the rectangles that the tokens make; the whole where they are one.
        masks: of each segment, by the layer's window (None for full attention).
        attend: the attention backend.
        cache: where layers keep what the next step needs; None to keep nothing.
        embeds: (B, T, C) the embeddings, for layers that look back at them.
        notes: where layers put what was asked for beside their output.
        placing: what adapters are told of rows and layers; None if they need not know.
        texts: which tokens of a packed row are whose, told to the device; None of a rectangle, and
            where no layer is recurrent.
        elsewhere: the same on other devices, which layers there share.
    """

    cos: Tensor
    sin: Tensor
    whole: Segment
    segments: tuple[Segment, ...]
    masks: tuple[Mapping[int | None, AttentionMask], ...]
    attend: AttentionBackend
    cache: Cache | None
    embeds: Tensor
    notes: Notes = field(default_factory=Notes)
    placing: Placing | None = None
    texts: Texts | None = None
    elsewhere: "dict[torch.device, ForwardContext]" = field(
        init=False, default_factory=dict, repr=False
    )

    @property
    def rectangular(self) -> bool:
        """Whether every row has the same number of tokens, so that they form one rectangle."""
        return self.segments[0].tokens is None

    def text_lengths(self) -> list[int] | None:
        """Return the number of tokens of each text in order, or None if there is padding."""
        if any(one.counts is not None for one in self.segments):
            return None
        lengths = []
        for one in self.segments:
            rows = len(self.embeds) if one.rows is None else one.rows.stop - one.rows.start
            lengths += [one.length] * rows
        return lengths

    def separate_texts(self, window: int | None, dropout: float) -> list[int] | None:
        """Return the lengths of the packed texts if fused attention takes them in one call.

        None for anything else: a cache, a mask, a window less than a text, dropout, adapters that
        go by rows.
        """
        if self.rectangular or self.cache is not None or self.attend is not sdpa:
            return None
        if dropout or self.placing is not None:
            return None
        for one, masks in zip(self.segments, self.masks, strict=True):
            if not (masks[window].is_causal or one.length == 1):
                return None
        return self.text_lengths()

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer_idx: int,
        *,
        window: int | None,
        scale: float,
        dropout: float,
        stored: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from q (B, H, T, D) to k and v (B, K, T, D) and to the cache.

        Args:
            stored: whether the cache holds k and v already, so that they are all it has.
        """
        texts = self.separate_texts(window, dropout)
        if texts is not None and attends_learning(q, k, v):
            return attend_learning(q, k, v, scale, texts), None

        if stored and not self.rectangular and self.attend is sdpa and not dropout:
            assert self.whole.pages is not None
            output = attend_packed(q, k, v, self.whole.pages, window=window, scale=scale)
            if output is not None:
                return output, None

        def attend(
            mask: AttentionMask, q: Tensor, k: Tensor, v: Tensor
        ) -> tuple[Tensor, Tensor | None]:
            return self.attend(q, k, v, mask, scale=scale, dropout=dropout)

        return self.by_segment(attend, (q,), k, v, layer_idx, window=window, stored=stored)

    def rotate_and_keep(
        self,
        q: Tensor,
        k: Tensor,
        other: Tensor,
        layer_idx: int,
        *,
        norm: tuple[Tensor, float] | None = None,
        interleaved: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rotate queries and keys and store in one pass: return q, and all the cache holds then.

        None if no backend does, or the cache does not say where rows lie.

        Shapes: q (B, H, T, D), k (B, K, T, D), other (B, K, T, E): values, or latents, which a
        cache has before their keys.

        Args:
            norm: weight and epsilon of the normalisation of latents; None of values.
            interleaved: whether neighbours are rotated together.
        """
        pages = self.whole.pages
        memory = None if self.cache is None or pages is None else self.cache.memory(layer_idx)
        if memory is None or pages is None:
            return None
        turned = keep_rows(
            q,
            k,
            other,
            self.cos,
            self.sin,
            memory if norm is None else memory[::-1],
            pages,
            norm=norm,
            interleaved=interleaved,
        )
        return None if turned is None else (turned, *memory)

    def by_segment(
        self,
        attend: Callable[..., tuple[Tensor, Tensor | None]],
        queries: tuple[Tensor, ...],
        keys: Tensor,
        values: Tensor,
        layer_idx: int,
        *,
        window: int | None,
        stored: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Store the new keys and values, and attend segment by segment.

        Shapes: (B, H, T, ...), all given; returns (B, H, T, D) and weights (B, H, T, S), or
        of n rows with unequally many tokens (n, H, T, S), the longest one's.

        Args:
            attend: from a mask, queries, keys and values of a segment to the same.
            stored: whether keys and values are all those of the cache, these tokens' included.
        """
        if self.rectangular:
            if self.cache is not None and not stored:
                keys, values = self.cache.update(keys, values, layer_idx, self.whole)
            with placed(self.placing and self.placing.of_rows(None)):
                return attend(self.masks[0][window], *queries, keys, values)
        outs, weights = [], []
        own = zip(*(self._split(x) for x in queries), strict=True)
        if stored:
            pairs = [_reached((keys, values), one) for one in self.segments]
        else:
            pairs = self._stored(keys, values, layer_idx)
        for masks, parts, pair, one in zip(self.masks, own, pairs, self.segments, strict=True):
            with placed(self.placing and self.placing.of_rows(one.rows)):
                out, weighed = attend(masks[window], *parts, *pair)
            outs.append(out.transpose(1, 2))
            if weighed is not None:
                weights.append(weighed)
        return self.joined(outs).transpose(1, 2), self._stacked(weights) if weights else None

    def split(self, x: Tensor) -> list[Tensor]:
        """Split (B, T, ...) into one tensor (b, t, ...) per segment."""
        if self.rectangular:
            return [x]
        flat = x.flatten(0, 1)
        return [torch.unflatten(flat[one.tokens], 0, (-1, one.length)) for one in self.segments]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """Join one tensor (b, t, ...) per segment into (B, T, ...)."""
        if self.rectangular:
            return pieces[0]
        flat = torch.cat([piece.flatten(0, 1) for piece in pieces])
        return torch.unflatten(flat, 0, self.embeds.shape[:2])

    def padded(self, pieces: Sequence[Tensor]) -> Tensor:
        """Pad one tensor (b, t, ...) per segment to (n, T, ...).

        What is behind a row's end is meaningless but finite.
        """
        if self.rectangular:
            return pieces[0]
        counts = self.whole.counts
        assert counts is not None
        steps = torch.arange(self.whole.length, dtype=torch.long, device=counts.device)
        places = (counts.cumsum(0) - counts)[:, None] + steps
        flat = torch.cat([piece.flatten(0, 1) for piece in pieces])
        return flat[places.clamp(max=len(flat) - 1)]

    def _split(self, x: Tensor) -> list[Tensor]:
        return [piece.transpose(1, 2) for piece in self.split(x.transpose(1, 2))]

    def _stored(self, keys: Tensor, values: Tensor, layer_idx: int) -> list[tuple[Tensor, Tensor]]:
        """Store (B, K, T, D) of all segments, and return the keys and values each attends to."""
        own = list(zip(self._split(keys), self._split(values), strict=True))
        if self.cache is None:
            return own
        cache, pairs = self.cache, list(zip(own, self.segments, strict=True))
        if not (torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)):
            return [cache.update(*pair, layer_idx, segment) for pair, segment in pairs]
        # Buffers that gradients pass are written once, or each segment would copy them.
        rows = [self.padded([x.transpose(1, 2) for x in kind]) for kind in zip(*own, strict=True)]
        keys, values = (x.transpose(1, 2) for x in rows)
        cached = cache.update(keys, values, layer_idx, self.whole)
        return [
            pair if segment.start == 0 else _reached(cached, segment) for pair, segment in pairs
        ]

    def _stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """Pad weights (b, H, t, s) per segment with zeros and stack them to (n, H, T, S)."""
        T, S = (max(x.shape[axis] for x in weights) for axis in (2, 3))
        empty = weights[0].new_zeros(1, weights[0].shape[1], T, S)
        stacked, row = [], 0
        for segment, x in zip(self.segments, weights, strict=True):
            assert segment.rows is not None
            stacked += [empty] * (segment.rows.start - row)
            stacked.append(F.pad(x, (0, S - x.shape[3], 0, T - x.shape[2])))
            row = segment.rows.stop
        stacked += [empty] * ((self.segments[0].batch or row) - row)
        return torch.cat(stacked)


def _reached(cached: tuple[Tensor, Tensor], segment: Segment) -> tuple[Tensor, Tensor]:
    keys, values = (segment.rows_of(x)[:, :, : segment.keys] for x in cached)
    return keys, values
