"""Decoders with experts: router logits, and a loss that balances the experts."""

from typing import Any, Unpack, cast

import torch
from torch import Tensor

from quintet.cache import Cache, LegacyCache
from quintet.checkpoint import StackExperts
from quintet.modeling.decoder import DecoderModel, first
from quintet.modeling.heads import (
    CausalLMHead,
    LabelOptions,
    padding_mask,
    select_positions,
    split_options,
)
from quintet.modeling.outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from quintet.modeling.packing import Packing, takes_packing
from quintet.ops.losses import Items

EXPERT_STACKS = (
    StackExperts(
        "experts.gate_up_proj", ("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight")
    ),
    StackExperts("experts.down_proj", ("experts.{}.down_proj.weight",)),
)


class MoeDecoderModel(DecoderModel):
    """A decoder with experts in some layers."""

    expert_stacks = EXPERT_STACKS

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
        output_router_logits: bool | None = None,
        **packing: Unpack[Packing],
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """Run the layers over T new tokens of each row; arguments as in `DecoderModel.forward`.

        Args:
            output_router_logits: return what the router of each layer with experts computed.
        """
        wanted = first(output_router_logits, self.config.output_router_logits)
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
            output_router_logits=wanted,
        )
        output = MoeModelOutputWithPast(
            last_hidden_state=run.hidden,
            past_key_values=run.past,
            hidden_states=run.states,
            attentions=run.attentions,
            router_logits=tuple(x.flatten(0, 1) for x in run.router_logits) if wanted else None,
        )
        return output if first(return_dict, self.config.return_dict) else output.to_tuple()


class MoeCausalLMHead(CausalLMHead):
    """A language-modelling head with a load-balancing loss."""

    expert_stacks = EXPERT_STACKS

    def aux_loss_weight(self, labels: Tensor | None, output_router_logits: bool) -> float | None:
        """Return the weight of the balance loss in this forward, or None to skip it."""
        raise NotImplementedError

    def aux_loss(self, router_logits: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """Return the balance loss; router_logits (B·T, E) per layer, mask (B, T)."""
        raise NotImplementedError

    # The order of the output's fields is Transformers', which no subclass of the plain one has.
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
        num_items_in_batch: Items = None,
        **options: Unpack[LabelOptions],
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Return the next token's logits (B, T, V); arguments as in `CausalLMHead.forward`.

        Args:
            output_router_logits: return what the router of each layer with experts computed, and
                the balance loss.
            num_items_in_batch: divides the sum over labels alone; the balance is that of the
                tokens of this call.
        """
        shift_labels, packing = split_options(options)
        routed = first(output_router_logits, self.config.output_router_logits)
        weight = self.aux_loss_weight(shift_labels if labels is None else labels, routed)
        outputs = cast(
            "MoeModelOutputWithPast",
            self.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                cache_position=cache_position,
                output_router_logits=routed or weight is not None,
                return_dict=True,
                **packing,
            ),
        )
        output = MoeCausalLMOutputWithPast(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if routed else None,
        )
        padding, states = padding_mask(attention_mask), outputs.last_hidden_state
        if labels is None and shift_labels is None:
            output.logits = self.logits_of(states, logits_to_keep)
        else:
            hidden = select_positions(states, logits_to_keep)
            texts = self.texts(
                hidden, packing, attention_mask, position_ids, past_key_values, use_cache=use_cache
            )
            self.learn(output, hidden, labels, shift_labels, padding, texts, num_items_in_batch)
        if weight is not None and outputs.router_logits:
            mask = states.new_ones(states.shape[:2], dtype=torch.long)
            if padding is not None:
                mask = padding[:, -mask.shape[1] :]
            output.aux_loss = self.aux_loss(outputs.router_logits, mask)
            if output.loss is not None:
                output.loss = output.loss + weight * output.aux_loss
        return cast("MoeCausalLMOutputWithPast", self._returned(output, return_dict))
