"""Multi-token prediction: extra layers that predict tokens beyond the next one.

They are kept where checkpoints have them, after the `num_hidden_layers` of the main run, and use
its embedding and output head (DeepSeek-V3, arXiv:2412.19437, §2.2).
"""

import copy
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import Any, Unpack

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.cache import AttentionSlot, Cache, LegacyCache, PooledCache, Segment
from quintet.cache.dense import DynamicSlot
from quintet.errors import InputError
from quintet.layers.context import ForwardContext, Notes
from quintet.modeling.decoder import first
from quintet.modeling.heads import (
    LabelOptions,
    mean_loss,
    padding_mask,
    select_positions,
    split_options,
)
from quintet.modeling.moe import MoeCausalLMHead, MoeDecoderModel
from quintet.modeling.outputs import MoeCausalLMOutputWithPast
from quintet.modeling.packing import own_labels, takes_packing
from quintet.ops.documents import Documents
from quintet.ops.labels import following_tokens
from quintet.ops.losses import Items
from quintet.ops.ragged import padding_of

# The slots of all rows, and the rectangles that the tokens make.
Segments = tuple[Segment, tuple[Segment, ...]]


class MissingPredictionLayersWarning(UserWarning):
    """The config counts prediction layers that the checkpoint lacks."""


class PredictionLayer(nn.Module):
    """Interface of a family's prediction layer."""

    shared_head: nn.ModuleDict

    def forward(self, hidden_states: Tensor, context: ForwardContext, ahead: Tensor) -> Tensor:
        """Combine states with embeddings of later tokens and apply the layer, all (B, T, C).

        Shapes: (B, T, C), all three.
        """
        raise NotImplementedError


class MtpDecoderModel(MoeDecoderModel):
    """A decoder with prediction layers."""

    def prediction_layers(self) -> list[PredictionLayer]:
        """Return the layers behind the main ones."""
        # A slice of a list of modules would be a module, and this is asked at every step.
        further = islice(self.layers, self.config.num_hidden_layers, None)
        return [layer for layer in further if isinstance(layer, PredictionLayer)]

    def look_ahead(
        self,
        hidden_states: Tensor,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        texts: Documents | None = None,
        notes: Notes | None = None,
    ) -> list[Tensor]:
        """Return the normalised states (B, T, C) of each prediction layer.

        Layer k joins the states of layer k - 1 at position t, those of the main run for k = 1,
        with the embedding of token t + k. The last k tokens of a row, and of each of several texts
        in it, have none: their states mean nothing. Masks, positions and texts are those of the
        main run; notes are where these layers put what is asked for, as (B, T, E) router logits.
        """
        B, T, _ = embeds.shape
        rows = custom = None
        if texts is not None:
            position_ids = texts.positions() if position_ids is None else position_ids
        elif attention_mask is not None and attention_mask.ndim == 2:
            rows = padding_of(attention_mask[:, -T:])
        elif attention_mask is not None:
            floats = attention_mask.is_floating_point()
            custom = attention_mask if floats else attention_mask.to(torch.bool)
        if position_ids is not None:
            position_ids = position_ids.reshape(-1, T).expand(B, T)
        if rows is not None:
            hidden_states, embeds = rows.pack(hidden_states), rows.pack(embeds)
            position_ids = None if position_ids is None else rows.pack(position_ids)
        taken = self._segments(embeds, rows or texts, None)
        # Rotary scores see differences alone, so that the position of t serves for t + k too.
        notes = Notes() if notes is None else notes
        context = self._context(embeds, taken, position_ids, custom, None, notes, texts)

        states = []
        for k, layer in enumerate(self.prediction_layers(), start=1):
            if texts is None or texts.lengths is not None:
                ahead = context.joined([_later(x, k) for x in context.split(embeds)])
            else:
                ahead = texts.ahead(embeds, k)
            index = self.config.num_hidden_layers + k - 1
            hidden_states = self._run_layer(layer, index, hidden_states, context, ahead=ahead)
            hidden_states = layer.shared_head["norm"](hidden_states)
            states.append(hidden_states)
        # With layers on several devices: what is returned is where it began.
        states = [state.to(embeds.device) for state in states]
        if rows is None:
            return states
        if notes.router_logits is not None:
            notes.router_logits[:] = [rows.unpack(logits) for logits in notes.router_logits]
        return [rows.unpack(state) for state in states]

    def predict(
        self,
        depth: int,
        states: Tensor,
        ahead: Tensor,
        taken: Segments,
        cache: Cache,
        notes: Notes | None = None,
    ) -> Tensor:
        """Return the normalised states (B, T, C) of one prediction layer, with a cache.

        Args:
            depth: which layer, 0 being the first.
            states: (B, T, C) of the layer before it, those of the main run for the first; or
                (1, N, C) of rows with unequally many tokens, as `ahead`.
            ahead: (B, T, C) the embeddings of the tokens that lie `depth` + 1 ahead.
            taken: the slots these take in all rows of the cache, and the rectangles they make.
            cache: what the layers keep; see `prediction_cache`.
            notes: where the layer puts what is asked for.
        """
        layer = self.prediction_layers()[depth]
        # Rotary scores see differences alone, so that slots serve for positions.
        context = self._context(
            ahead, taken, None, None, cache, Notes() if notes is None else notes
        )
        index = self.config.num_hidden_layers + depth
        outputs = self._run_layer(layer, index, states, context, ahead=ahead)
        return layer.shared_head["norm"](outputs).to(ahead.device)  # type: ignore[no-any-return]

    def prediction_cache(self) -> Cache:
        """Return an empty cache for the prediction layers."""
        before: list[AttentionSlot | None] = [None] * self.config.num_hidden_layers
        return Cache([*before, *(DynamicSlot() for _ in self.prediction_layers())])

    def prediction_pool(self, rows: int, capacity: int) -> PooledCache:
        """Return an empty pool for the prediction layers alone."""
        config = copy.copy(self.config)
        config.num_hidden_layers += len(self.prediction_layers())
        return PooledCache(config, rows, capacity)


class MtpCausalLMHead(MoeCausalLMHead):
    """A language-modelling head with multi-token prediction."""

    model: MtpDecoderModel

    @takes_packing
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        output_mtp_logits: bool = False,
        mtp_loss_weight: float | None = None,
        num_items_in_batch: Items = None,
        **options: Unpack[LabelOptions],
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Return the next token's logits (B, T, V); arguments as in `CausalLMHead.forward`.

        Args:
            output_router_logits: return what the router of each layer with experts computed.
            output_mtp_logits: return what each prediction layer predicts: `mtp_logits[k - 1]` has
                at t the logits of token t + k + 1, made from the state at t and the tokens up to
                t + k, and nothing of meaning at the last k tokens of a row.
            mtp_loss_weight: λ; adds λ/D · Σ_k L_k to the loss, L_k being the cross-entropy of what
                the k-th of D prediction layers predicts (arXiv:2412.19437, eq. 24-25).
                `mtp_loss` is the mean of the L_k.
            num_items_in_batch: divides the sums over labels, those of the L_k too.

        Raises:
            InputError: an argument cannot be used, or two contradict each other.
        """
        shift_labels, packing = split_options(options)
        looks_ahead = output_mtp_logits or mtp_loss_weight is not None
        if looks_ahead:
            self._check_look_ahead(past_key_values)
        unlabelled = labels is None and shift_labels is None
        if mtp_loss_weight is not None and (unlabelled or mtp_loss_weight < 0):
            raise InputError(
                f"mtp_loss_weight={mtp_loss_weight} weighs a loss; it is at least 0, "
                "and needs labels"
            )
        states_requested = first(output_hidden_states, self.config.output_hidden_states)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=states_requested or looks_ahead,
            return_dict=True,
            cache_position=cache_position,
            logits_to_keep=logits_to_keep,
            output_router_logits=output_router_logits,
            num_items_in_batch=num_items_in_batch,
            **options,
        )
        assert isinstance(output, MoeCausalLMOutputWithPast)
        if looks_ahead and output.hidden_states is not None:
            embeds, hidden = output.hidden_states[0], output.hidden_states[-1]
            texts = self.texts(
                hidden, packing, attention_mask, position_ids, past_key_values, use_cache=use_cache
            )
            ahead = self.model.look_ahead(hidden, embeds, attention_mask, position_ids, texts)
            if output_mtp_logits:
                output.mtp_logits = tuple(
                    self.lm_head(select_positions(x, logits_to_keep)) for x in ahead
                )
            if mtp_loss_weight is not None and output.loss is not None:
                mask, head = padding_mask(attention_mask), self.scored_head()
                losses = [
                    mean_loss(
                        head, x, _targets(k, labels, shift_labels, mask, texts), num_items_in_batch
                    )
                    for k, x in enumerate(ahead, start=1)
                ]
                output.mtp_loss = torch.stack(losses).mean()
                output.loss = output.loss + mtp_loss_weight * output.mtp_loss
        if not states_requested:
            output.hidden_states = None
        return output if first(return_dict, self.config.return_dict) else output.to_tuple()

    # -- what drafting by prediction layers needs -----------------------------------------------

    def prediction_depth(self) -> int:
        """Count the prediction layers."""
        return len(self.model.prediction_layers())

    def prediction_cache(self) -> Cache:
        """Return an empty cache for the prediction layers."""
        return self.model.prediction_cache()

    def prediction_pool(self, rows: int, capacity: int) -> PooledCache:
        """Return an empty pool for the prediction layers."""
        return self.model.prediction_pool(rows, capacity)

    def predict(
        self, depth: int, states: Tensor, ahead: Tensor, taken: Segments, cache: Cache
    ) -> Tensor:
        """Return the states (B, T, C) of one prediction layer; see `MtpDecoderModel.predict`."""
        return self.model.predict(depth, states, ahead, taken, cache)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., C) of ids."""
        return self.model.vectors(ids)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""
        return self.lm_head(states)  # type: ignore[no-any-return]

    # -- checkpoints ---------------------------------------------------------------------------

    def tied_names(self) -> dict[str, str]:
        """Return the names of tied parameters, mapped to the parameter they are."""
        tied = super().tied_names()
        embedding = f"{self.base_model_prefix}.embed_tokens.weight"
        head = tied.get("lm_head.weight", "lm_head.weight")
        for prefix in self._prediction_prefixes():
            tied[f"{prefix}embed_tokens.weight"] = embedding
            tied[f"{prefix}shared_head.head.weight"] = head
        return tied

    def optional_names(self, tensor_names: Iterable[str]) -> tuple[str, ...]:
        """Return the prefixes of trailing prediction layers that a checkpoint lacks."""
        names, prefixes = list(tensor_names), self._prediction_prefixes()
        found = [any(name.startswith(prefix) for name in names) for prefix in prefixes]
        return tuple(prefix for i, prefix in enumerate(prefixes) if not any(found[i:]))

    def drop(self, prefixes: tuple[str, ...]) -> None:
        """Remove the prediction layers that a checkpoint lacks."""
        if prefixes:
            del self.model.layers[-len(prefixes) :]
            warnings.warn(
                f"{self.config.name_or_path or 'the checkpoint'} holds nothing for "
                f"{', '.join(prefixes)}: the model comes without these layers of multi-token "
                "prediction, which its config counts",
                MissingPredictionLayersWarning,
                stacklevel=5,
            )

    def _prediction_prefixes(self) -> list[str]:
        L = self.config.num_hidden_layers
        indices = range(L, L + len(self.model.prediction_layers()))
        return [f"{self.base_model_prefix}.layers.{index}." for index in indices]

    def _check_look_ahead(self, past: Cache | LegacyCache | None) -> None:
        if not self.model.prediction_layers():
            raise InputError(
                "output_mtp_logits=True needs layers of multi-token prediction, and this model has "
                "none (config.num_nextn_predict_layers=0)"
            )
        if isinstance(past, tuple) or (past is not None and past.get_seq_length() > 0):
            raise InputError(
                "output_mtp_logits=True looks ahead in a whole text, without a past; "
                "call the model on all of it, with an empty cache or none"
            )


def _later(x: Tensor, k: int) -> Tensor:
    """Shift (B, T, C) by k: position t gets position t + k, zeros at the end."""
    return F.pad(x[:, k:], (0, 0, 0, min(k, x.shape[1])))


def _targets(
    k: int,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    mask: Tensor | None,
    texts: Documents | None,
) -> Tensor:
    """Return the labels (B, T) of prediction layer k, which lie k + 1 tokens ahead."""
    if shift_labels is not None:
        return following_tokens(own_labels(shift_labels, texts, k + 1, shifted=1), mask, k)
    assert labels is not None
    return following_tokens(own_labels(labels, texts, k + 1), mask, k + 1)
