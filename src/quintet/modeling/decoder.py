"""The forward of a decoder without a head, shared by all families.

What a family adds is its layers: each maps hidden states and a `ForwardContext` to hidden states.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from quintet.cache import Cache, DynamicCache, LegacyCache, Segment, to_legacy
from quintet.errors import InputError
from quintet.layers.context import ForwardContext, Notes
from quintet.layers.rotary import RotaryEmbedding
from quintet.modeling.contract import vocabulary_of
from quintet.modeling.inputs import (
    check_causal,
    check_custom,
    check_embeds,
    check_past,
    first_position,
    opened,
    positions,
    split_mask,
)
from quintet.modeling.layer_stack import LayerStack
from quintet.modeling.outputs import BaseModelOutputWithPast
from quintet.modeling.packing import Packing, packed, takes_packing
from quintet.modeling.segmenting import angles, masks, segments, texts_of
from quintet.ops.attention import attention_backend
from quintet.ops.documents import Documents
from quintet.ops.ragged import Padding, keys_in_columns, padding_of
from quintet.ops.token_ids import check_placed, check_token_ids
from quintet.quantization import QuantizedEmbedding
from quintet.sharding import Section, Sharding, rows

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class LayersOutput:
    """The output of all layers, in the input's columns.

    Attributes:
        hidden: (B, T, C), the last layer's output, normalised.
        states: the embeddings and each layer's output, the last one normalised, where asked for.
        past: what the next call continues from, where it was asked for.
        attentions: the weights of each layer, where they were asked for.
        router_logits: (B, T, E) of each layer with experts.
    """

    hidden: Tensor
    states: tuple[Tensor, ...] | None
    past: Cache | LegacyCache | None
    attentions: tuple[Tensor, ...] | None
    router_logits: tuple[Tensor, ...]


class DecoderModel(LayerStack):
    """Embedding, decoder layers and a final norm.

    Attributes:
        windows: the attention windows that occur among the layers; None is full attention.
    """

    embed_tokens: nn.Embedding
    rotary_emb: RotaryEmbedding
    windows: Iterable[int | None] = (None,)

    @takes_packing
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **packing: Unpack[Packing],
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run the layers over T new tokens of each row.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T) or, with a cache, (B, past + T): 1 for tokens, 0 for padding,
                which may be anywhere; or (B, 1, T, S), a mask of the caller's own, boolean or
                added to the scores.
            position_ids: (B, T) for the rotary embedding; counted from the first token of each
                row where not given. Without a mask and a cache, a text ends where they jump.
            past_key_values: what the tokens before left behind.
            inputs_embeds: (B, T, C) in place of `input_ids`.
            use_cache: return a cache that the next call continues from.
            output_attentions: return the weights of every layer, computed by `eager`.
            output_hidden_states: return the embeddings and the output of every layer.
            return_dict: False for a plain tuple.
            cache_position: (T,) the slots to write, to go back to an earlier point of the cache.
            cu_seq_lens_q: (n + 1,) where each of n texts packed into the rows begins, counted over
                all rows, and the end. No text sees another. With a cache of n rows, how many of
                (1, N) tokens each of its rows is given, of which some may be given none.
            cu_seq_lens_k: the same again.
            max_length_q: the length of the longest of these texts, or more.
            max_length_k: the same again.
            seq_idx: (B, T) numbers that change where a text ends, in place of `cu_seq_lens_q`.
            adapter_names: an adapter for each row, or each text of `cu_seq_lens_q` that has a row
                of a cache; None, or "__base__", for none. Those in use do not matter then.

        Raises:
            InputError: an argument cannot be used, or two contradict each other.
            ContextLengthError: a preallocated cache has no room.
        """
        run = self._run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
            packing=packing,
        )
        output = BaseModelOutputWithPast(
            last_hidden_state=run.hidden,
            past_key_values=run.past,
            hidden_states=run.states,
            attentions=run.attentions,
        )
        return output if first(return_dict, self.config.return_dict) else output.to_tuple()

    def new_cache(self) -> Cache:
        """Return an empty cache of the kind this family grows."""
        return DynamicCache(self.config)

    def sharding(self) -> Sharding:
        """Split the embedding by vocabulary over processes."""
        ids = Section(self.config.vocab_size, 1, "vocab_size", uneven=True)
        return Sharding({"embed_tokens.weight": rows(ids)}, vocabulary=("embed_tokens",))

    def texts(
        self,
        shape: tuple[int, int],
        packing: Packing,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | LegacyCache | None,
        *,
        use_cache: bool | None,
    ) -> Documents | None:
        """Return the texts packed into rows (B, T), or None if each row is one text."""
        texts = packed(
            packing,
            shape,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past=past_key_values,
            keeps=use_cache is True and not self._recomputes(),
        )
        if texts is None or texts.lengths is not None or not self.config.recurrent_layers():
            return texts
        torch._assert_async((texts.index == 0).all(), "a recorded program has one text in a row")
        return None

    # -- the steps of forward ----------------------------------------------------------------

    def _run(
        self,
        *,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | LegacyCache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        cache_position: Tensor | None,
        packing: Packing,
        output_router_logits: bool = False,
    ) -> LayersOutput:
        if self.adapters is not None:
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            self.place_tokens(tokens, packing.get("cu_seq_lens_q"))
        embeds = self._embed(input_ids, inputs_embeds)
        B, T, _ = embeds.shape
        if position_ids is not None:
            position_ids = positions(position_ids, B, T)
        texts = self.texts(
            (B, T), packing, attention_mask, position_ids, past_key_values, use_cache=use_cache
        )
        use_cache = self._decide_cache(use_cache, past_key_values)
        if texts is not None:
            attention_mask = None
            use_cache = use_cache and (past_key_values is not None or texts.lengths is None)
            if position_ids is None and past_key_values is None:
                position_ids = texts.positions()
        weighs = first(output_attentions, self.config.output_attentions)
        mask, custom = split_mask(attention_mask, B, T)
        if attention_mask is not None and attention_mask.is_meta:
            check_placed("attention_mask", attention_mask, embeds.device)
        rows = None if mask is None else padding_of(mask[:, -T:])

        cache: Cache | None
        if past_key_values is None:
            cache = self.new_cache() if use_cache else None
        else:
            cache = opened(past_key_values, mask, embeds, self.config)
        if cache_position is not None:
            if cache is not None:
                cache.seek(first_position(cache_position, T))
            elif position_ids is None:
                position_ids = cache_position[None]
        if cache is not None:
            check_past(cache, mask, B, T)

        given = embeds
        if rows is not None:
            embeds = rows.pack(embeds)
            position_ids = None if position_ids is None else rows.pack(position_ids)
        taken = whole, _ = self._segments(embeds, rows or texts, cache)
        if custom is not None:
            check_custom(custom, self.config.num_attention_heads, whole.keys)
            if self.config.recurrent_layers():
                check_causal(custom, whole)
                custom = None

        notes = Notes(weights=weighs, router_logits=output_router_logits)
        context = self._context(embeds, taken, position_ids, custom, cache, notes, texts)
        if self.adapters is not None:
            context = replace(context, placing=self.placing(rows, cache))
        keeps = first(output_hidden_states, self.config.output_hidden_states)
        states = self._run_layers(embeds, context, rows, keeps)
        if cache is not None:
            cache.advance(whole)
        # With layers on several devices: what a run returns is where it began.
        states = _together(states, embeds)
        weights, routed = (
            _together(kind or [], embeds) for kind in (notes.weights, notes.router_logits)
        )
        if rows is not None:
            routed = [rows.unpack(logits) for logits in routed]
        if weighs and mask is not None:
            weights = [_in_columns(w, rows, mask, whole.keys) for w in weights]
        elif weighs and cache is None and texts is not None and texts.lengths is not None:
            weights = [texts.in_columns(w) for w in weights]
        if cache is not None and cache.seen is not None:
            cache.seen.append((states[-1], given, None if mask is None else mask[:, -T:].bool()))

        past: Cache | LegacyCache | None = cache if use_cache else None
        if past is not None and cache is not None and isinstance(past_key_values, tuple):
            past = to_legacy(cache, mask)
        return LayersOutput(
            hidden=states[-1],
            states=tuple(states) if keeps else None,
            past=past,
            attentions=tuple(weights) if weighs else None,
            router_logits=tuple(routed),
        )

    def vectors(self, ids: Tensor) -> Tensor:
        """Embed ids (B, T), in the dtype of the layers."""
        vectors: Tensor = self.embed_tokens(ids)
        if isinstance(self.embed_tokens, QuantizedEmbedding):
            # Who gives all parameters another dtype, as PEFT does, has none of these to change.
            return vectors.to(self.dtype)
        return vectors

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            check_token_ids(input_ids, vocabulary_of(self.embed_tokens, self.config))
            if input_ids.is_meta:
                check_placed("input_ids", input_ids, self.device)
            return self.vectors(input_ids)
        check_embeds(inputs_embeds, self.config.hidden_size, self.dtype)
        return inputs_embeds

    def _decide_cache(self, use_cache: bool | None, past: Cache | LegacyCache | None) -> bool:
        if self._recomputes() and past is None:
            if use_cache:
                warnings.warn(
                    "use_cache=True has no effect while gradient checkpointing recomputes layers",
                    stacklevel=5,
                )
            return False
        return first(use_cache, self.config.use_cache)

    def _segments(
        self, embeds: Tensor, rows: Padding | Documents | None, cache: Cache | None
    ) -> tuple[Segment, tuple[Segment, ...]]:
        """Return the slots of tokens (B, T, C), packed: of all rows, and by segment."""
        learns = cache is not None and torch.is_grad_enabled()
        learns = learns and any(p.requires_grad for p in self.parameters())
        return segments(embeds, rows, cache, learns=learns)

    def _context(
        self,
        embeds: Tensor,
        taken: tuple[Segment, tuple[Segment, ...]],
        position_ids: Tensor | None,
        custom: Tensor | None,
        cache: Cache | None,
        notes: Notes,
        texts: Documents | None = None,
    ) -> ForwardContext:
        whole, own = taken
        cos, sin = angles(self.rotary_emb, own, position_ids, embeds.dtype)
        implementation = self.config.attn_implementation if notes.weights is None else "eager"
        return ForwardContext(
            cos=cos,
            sin=sin,
            whole=whole,
            segments=own,
            masks=masks(own, set(self.windows), custom, texts),
            attend=attention_backend(implementation),
            cache=cache,
            embeds=embeds,
            notes=notes,
            texts=texts_of(own) if self.config.recurrent_layers() else None,
        )


def _together(tensors: list[Tensor], like: Tensor) -> list[Tensor]:
    return [tensor.to(like.device) for tensor in tensors]


def _in_columns(weights: Tensor, rows: Padding | None, mask: Tensor, keys: int) -> Tensor:
    if rows is None and mask.shape[1] == weights.shape[2] == keys:
        # No padding and nothing before: the very weights, through which gradients pass.
        return weights
    if rows is not None:
        weights = rows.unpack_rows(weights.transpose(1, 2)).transpose(1, 2)
    # A mask of the new tokens alone does not tell in which columns those in the cache were.
    covers = mask.shape[1] >= keys
    return keys_in_columns(weights, mask) if covers else weights


def first(value: Value | None, default: Value) -> Value:
    """Return a value, or the default where it is not given."""
    return default if value is None else value
