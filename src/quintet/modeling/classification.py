"""Heads that classify texts or tokens, or extract answers, on any base model."""

from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from quintet.cache import Cache, LegacyCache
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError
from quintet.layers.linear import Linear
from quintet.modeling.heads import Headed, check_shape, given, padding_mask
from quintet.modeling.outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from quintet.modeling.packing import Packing, takes_packing
from quintet.ops.labels import of_tokens
from quintet.ops.losses import Items, sequence_loss, span_loss, token_loss
from quintet.sharding import WHOLE, Sharding


class ClassificationHead(Headed):
    """A head with few outputs."""

    def sharding(self) -> Sharding:
        """Keep the head whole on every process: it is small."""
        names = (name for name, _ in self.named_parameters())
        return Sharding({name: WHOLE for name in names if name.startswith(self.new_head)})


class SequenceClassificationHead(ClassificationHead):
    """Classifies a sequence by its last token that is not padding.

    The first loss notes in the config what kind of problem this is.
    """

    new_head = ("score.",)
    loss_type = "ForSequenceClassification"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self.init_module(self.score)

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
        num_items_in_batch: Items = None,
        **packing: Unpack[Packing],
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Return logits (B, num_labels); arguments as in `DecoderModel.forward`.

        Args:
            labels: (B,) classes; or (B,), (B, num_labels) numbers for a regression; or
                (B, num_labels) of 0..1 for several labels at once. `config.problem_type` decides
                which; where it is not set, the number of labels and the dtype do, and it is set.
            num_items_in_batch: what the sum over labels is divided by in place of their number.

        Raises:
            InputError: several rows, and neither pad_token_id nor a mask tells where each ends.
        """
        outputs = self._base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packing,
        )
        scores = self.score(outputs.last_hidden_state)
        B = scores.shape[0]
        last = self._last_tokens(input_ids, padding_mask(attention_mask), *scores.shape[:2])
        logits = scores[torch.arange(B, device=scores.device, dtype=torch.long), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=scores,
                labels=labels,
                pooled_logits=logits,
                config=self.config,
                **given(num_items_in_batch=num_items_in_batch),
            )
        output = SequenceClassifierOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )
        return cast("SequenceClassifierOutputWithPast", self._returned(output, return_dict))

    def loss_function(
        self,
        labels: Tensor,
        pooled_logits: Tensor,
        config: PreTrainedConfig,
        num_items_in_batch: Items = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of sequences, and record the problem type in the config.

        May be replaced by assigning another, which is also given the logits (B, T, num_labels) of
        all tokens. Shapes: pooled_logits (B, num_labels), labels as in `forward`.
        """
        kind = config.problem_type or _problem_type(labels, config.num_labels)
        loss = sequence_loss(pooled_logits, labels, kind, num_items_in_batch)
        config.problem_type = kind
        return loss

    def _last_tokens(
        self, input_ids: Tensor | None, mask: Tensor | None, B: int, T: int
    ) -> Tensor | int:
        """Return the column, of T, of each row's last token that is not padding."""
        pad = self.config.pad_token_id
        if mask is not None:
            tokens = mask[:, -T:] != 0
        elif input_ids is not None and pad is not None:
            tokens = input_ids != pad
        elif B == 1 or pad is not None:
            return -1
        else:
            raise InputError(
                f"a batch of {B} rows needs config.pad_token_id or an attention_mask, to tell "
                "where each row ends; set model.config.pad_token_id = tokenizer.pad_token_id"
            )
        return (torch.arange(T, device=tokens.device, dtype=torch.long) * tokens).argmax(dim=-1)


def _problem_type(labels: Tensor, num_labels: int) -> str:
    if not isinstance(labels, Tensor):
        raise InputError(f"labels is a {type(labels).__name__}; it has to be a tensor")
    if num_labels == 1:
        return "regression"
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return "multi_label_classification"
    return "single_label_classification"


class TokenClassificationHead(ClassificationHead):
    """Classifies each token."""

    new_head = ("score.",)
    loss_type = "ForTokenClassification"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(0.1 if rate is None else rate)
        self.score = Linear(config.hidden_size, config.num_labels)
        self.init_module(self.score)

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
        num_items_in_batch: Items = None,
        **packing: Unpack[Packing],
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Return logits (B, T, num_labels); arguments as in `DecoderModel.forward`.

        Args:
            labels: (B, T) classes, -100 where the loss ignores them; it ignores padding, too.
            num_items_in_batch: what the sum over labels is divided by in place of their number.
        """
        outputs = self._base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packing,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_shape("labels", labels, logits)
            loss = self.loss_function(
                logits,
                of_tokens(labels, padding_mask(attention_mask)),
                self.config,
                **given(num_items_in_batch=num_items_in_batch),
            )
        output = TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return cast("TokenClassifierOutput", self._returned(output, return_dict))

    def loss_function(
        self,
        logits: Tensor,
        labels: Tensor,
        config: PreTrainedConfig,
        num_items_in_batch: Items = None,
    ) -> Tensor:
        """Return the cross-entropy of (B, T) classes; may be replaced by assigning another."""
        return token_loss(logits, labels, num_items_in_batch)


class QuestionAnsweringHead(ClassificationHead):
    """Scores each token as the start and the end of an answer."""

    base_model_prefix = "transformer"
    new_head = ("qa_outputs.",)
    loss_type = "ForQuestionAnswering"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.qa_outputs = Linear(config.hidden_size, 2)
        self.init_module(self.qa_outputs)

    @takes_packing
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Items = None,
        **packing: Unpack[Packing],
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Return start and end logits (B, T) each; arguments as in `DecoderModel.forward`.

        Args:
            start_positions: (B,) the answer's first token; past the end, or at padding, where it
                was cut off.
            end_positions: (B,) the answer's last token.
            num_items_in_batch: what the sums over rows are divided by in place of their number.

        Raises:
            InputError: one of the two positions without the other.
        """
        if (start_positions is None) != (end_positions is None):
            raise InputError("start_positions and end_positions go together; give both or neither")
        outputs = self._base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packing,
        )
        starts, ends = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(
                starts,
                ends,
                start_positions,
                end_positions,
                **given(
                    num_items_in_batch=num_items_in_batch,
                    attention_mask=padding_mask(attention_mask),
                ),
            )
        output = QuestionAnsweringModelOutput(
            loss, starts, ends, outputs.hidden_states, outputs.attentions
        )
        return cast("QuestionAnsweringModelOutput", self._returned(output, return_dict))

    def loss_function(
        self,
        start_logits: Tensor,
        end_logits: Tensor,
        start_positions: Tensor,
        end_positions: Tensor,
        num_items_in_batch: Items = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy of both ends; may be replaced by assigning another.

        Shapes: logits (B, T), positions (B,), attention_mask (B, W).
        """
        return span_loss(
            start_logits,
            end_logits,
            start_positions,
            end_positions,
            attention_mask,
            num_items_in_batch,
        )
