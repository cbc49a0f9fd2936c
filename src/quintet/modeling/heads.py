"""The base of all heads, and the language-modelling head."""

from contextlib import AbstractContextManager
from typing import Any, ClassVar, Unpack, cast

import torch
from torch import Tensor, nn

from quintet.cache import Cache, LegacyCache
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError
from quintet.generation.mixin import GenerationMixin
from quintet.layers.linear import Linear
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.decoder import DecoderModel
from quintet.modeling.outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)
from quintet.modeling.packing import Packing, own_labels, takes_packing
from quintet.modeling.scoring import HeadInParts, ScoredHead, scored
from quintet.ops.documents import Documents
from quintet.ops.labels import IGNORED, following, of_tokens, predicted, readable
from quintet.ops.losses import Items, averaged, next_token_loss, token_loss
from quintet.quantization import refuse_idle_training
from quintet.sharding import Section, Sharding, rows


class LabelOptions(Packing, total=False):
    """Further options of a forward with labels.

    Labels that are shifted already are no parameter by name: a trainer that finds "label" in a name
    takes it for one that has to be given to get a loss.
    """

    shift_labels: Tensor | None


class Headed(PreTrainedModel):
    """A base model under `base_model_prefix`; its outputs are the head's inputs.

    Attributes:
        loss_type: what Transformers calls the head's loss; a trainer sees by it which labels count.
        accepts_loss_kwargs: that the loss of a part of a batch takes `num_items_in_batch`.
    """

    loss_type: ClassVar[str]
    accepts_loss_kwargs: ClassVar[bool] = True

    base_class: ClassVar[type[DecoderModel]]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        base = self.base_class(config)
        base.config = self.config
        self.add_module(self.base_model_prefix, base)

    def _base(self, **inputs: Any) -> BaseModelOutputWithPast:
        return cast("BaseModelOutputWithPast", self.base_model(**inputs, return_dict=True))

    def texts(self, hidden: Tensor, *given: Any, use_cache: bool | None) -> Documents | None:
        """Return the texts that states (B, T, C) belong to; see `DecoderModel.texts`."""
        B, T = hidden.shape[:2]
        return cast("DecoderModel", self.base_model).texts((B, T), *given, use_cache=use_cache)

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        if output.loss is not None:
            refuse_idle_training(self, output.loss)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


class CausalLMHead(Headed, GenerationMixin):
    """A language-modelling head."""

    loss_type = "ForCausalLM"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_module(self.lm_head)
        self.tie_weights()

    def sharding(self) -> Sharding:
        """Split the logits by vocabulary over processes."""
        ids = Section(self.config.vocab_size, 1, "vocab_size", uneven=True)
        return Sharding({"lm_head.weight": rows(ids)}, vocabulary=("lm_head",))

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head."""
        return self.lm_head

    def new_cache(self) -> Cache:
        """Return an empty cache of the kind this family grows."""
        return cast("DecoderModel", self.base_model).new_cache()

    def fused_session(self, cache: Cache | None) -> AbstractContextManager[None]:
        """Collect the layers' weights for the fused step once, for all steps inside."""
        return cast("DecoderModel", self.base_model).fused_session(cache)

    @takes_packing
    def forward(
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
        num_items_in_batch: Items = None,
        **options: Unpack[LabelOptions],
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return the next token's logits (B, T, V); arguments as in `DecoderModel.forward`.

        Args:
            labels: (B, T) ids to predict, -100 where the loss ignores them; they are shifted here.
                Padding, as a mask (B, T) tells, neither predicts nor is predicted.
            logits_to_keep: how many of the last positions to return logits of, 0 for all; or a
                tensor of positions (N,). The loss needs all of them.
            num_items_in_batch: what the sum over labels is divided by in place of their number:
                how many a batch has in all, of which this is a part.
            shift_labels: (B, T) the ids to predict where they are predicted, in place of `labels`.

        Raises:
            InputError: an argument cannot be used, or two contradict each other.
        """
        shift_labels, packing = split_options(options)
        outputs = self._base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
            **packing,
        )
        output = CausalLMOutputWithPast(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        hidden = outputs.last_hidden_state
        if labels is None and shift_labels is None:
            output.logits = self.logits_of(hidden, logits_to_keep)
        else:
            hidden = select_positions(hidden, logits_to_keep)
            texts = self.texts(
                hidden, packing, attention_mask, position_ids, past_key_values, use_cache=use_cache
            )
            self.learn(
                output,
                hidden,
                labels,
                shift_labels,
                padding_mask(attention_mask),
                texts,
                num_items_in_batch,
            )
        return cast("CausalLMOutputWithPast", self._returned(output, return_dict))

    def logits_of(self, hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """Return the logits of the selected positions of states (B, T, C)."""
        if self.adapters is None:
            return self.lm_head(select_positions(hidden, logits_to_keep))  # type: ignore[no-any-return]
        with self.selecting_tokens(lambda tokens: select_positions(tokens, logits_to_keep)):
            return self.lm_head(select_positions(hidden, logits_to_keep))  # type: ignore[no-any-return]

    def learn(
        self,
        output: CausalLMOutputWithPast | MoeCausalLMOutputWithPast,
        hidden: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        mask: Tensor | None,
        texts: Documents | None,
        items: Items,
    ) -> None:
        """Set loss and logits of the output, for labels of either kind.

        The logits of states (B, T, C) are set, too: to be made when they are read, where the loss
        does without them.
        """
        if labels is not None:
            check_shape("labels", labels, hidden)
            labels = predicted(own_labels(labels, texts), mask)
        if shift_labels is not None:
            check_shape("shift_labels", shift_labels, hidden)
            shift_labels = of_tokens(own_labels(shift_labels, texts, shifted=1), mask)
        head = self.scored_head()
        if isinstance(head, HeadInParts) and not self._has_own_loss():
            targets = following(cast("Tensor", labels)) if shift_labels is None else shift_labels
            output.loss = mean_loss(head, hidden, targets, items)
            output.defer("logits", head.later(hidden))
            return
        output.logits = logits = self.logits_of(hidden, 0)
        output.loss = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=logits.shape[-1],
            **given(num_items_in_batch=items, shift_labels=shift_labels),
        )

    def scored_head(self) -> ScoredHead:
        """Return the head in the form that losses use."""
        return scored(self.lm_head, by_rows=self.place_of_rows() is not None)

    def _has_own_loss(self) -> bool:
        replaced = type(self).loss_function is not CausalLMHead.loss_function
        return replaced or "loss_function" in vars(self)

    def loss_function(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Items = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the cross-entropy of the next tokens; may be replaced by assigning another.

        Shapes: logits (B, T, V), labels (B, T), or shift_labels (B, T) which are shifted already.

        Raises:
            InputError: the arguments do not fit each other.
        """
        if logits.shape[-1] != vocab_size:
            raise InputError(f"logits of {logits.shape[-1]} ids and vocab_size={vocab_size}")
        if shift_labels is not None:
            return token_loss(logits, shift_labels, num_items_in_batch, ignore_index)
        if labels is None:
            raise InputError("a loss needs labels, or shift_labels")
        return next_token_loss(logits, labels, items=num_items_in_batch, ignored=ignore_index)


def mean_loss(head: ScoredHead, hidden: Tensor, targets: Tensor, items: Items) -> Tensor:
    """Return the mean cross-entropy of ids (B, T), predicted from states (B, T, C)."""
    total = head.sums(hidden, targets).log_prob.neg().sum()
    return averaged(total, (targets != IGNORED).sum(), items)


def check_shape(name: str, labels: Tensor, hidden: Tensor) -> None:
    """Check that labels have the shape (B, T) of the positions with logits.

    Raises:
        InputError: there is not.
    """
    if not isinstance(labels, Tensor) or labels.shape != hidden.shape[:2]:
        shape = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels)
        raise InputError(
            f"{name} have {shape} and there are logits of {tuple(hidden.shape[:2])} positions; "
            "give a tensor with a label for each token, and logits_to_keep=0"
        )


def split_options(options: LabelOptions) -> tuple[Tensor | None, Packing]:
    """Split options into the shifted labels, or None, and the packing options."""
    packing: Any = {name: value for name, value in options.items() if name != "shift_labels"}
    return options.get("shift_labels"), packing


def padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """Return the mask if it is a padding mask (B, W), else None."""
    return attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def select_positions(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Select the positions of states (B, T, C) that `logits_to_keep` names.

    Raises:
        InputError: a negative number of positions, or positions that there are none of.
    """
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool):
        if logits_to_keep >= 0:
            return hidden[:, -logits_to_keep:]
    elif isinstance(logits_to_keep, Tensor) and _within(logits_to_keep, hidden.shape[1]):
        return hidden[:, logits_to_keep]
    raise InputError(
        f"logits_to_keep={logits_to_keep} has to be 0 for all positions, how many of the "
        f"last ones, or a tensor of positions, of {hidden.shape[1]}"
    )


def _within(positions: Tensor, T: int) -> bool:
    """Return whether positions are indices of T tokens, or a choice of them by truths."""
    if positions.ndim != 1 or positions.is_floating_point() or positions.is_complex():
        return False
    if positions.dtype == torch.bool:
        return len(positions) == T
    return not readable(positions) or bool(((positions >= -T) & (positions < T)).all())
