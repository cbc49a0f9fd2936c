"""The heads every family gets: one class each, on top of any base model."""

from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

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
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from quintet.modeling.packing import Packing, own_labels
from quintet.ops.documents import Documents
from quintet.ops.losses import next_token_loss, sequence_loss, span_loss, token_loss

__all__ = [
    "CausalLMHead",
    "QuestionAnsweringHead",
    "SequenceClassificationHead",
    "TokenClassificationHead",
    "check_labels",
    "kept",
]


class _Headed(PreTrainedModel):
    """A base model under `base_model_prefix`; its outputs are the head's inputs."""

    base_class: ClassVar[type[DecoderModel]]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        base = self.base_class(config)
        base.config = self.config
        self.add_module(self.base_model_prefix, base)

    def _base(self, **inputs: Any) -> BaseModelOutputWithPast:
        return cast("BaseModelOutputWithPast", self.base_model(**inputs, return_dict=True))

    def texts(self, logits: Tensor, *given: Any, use_cache: bool | None) -> Documents | None:
        """Return the texts of the rows that logits (B, T, V) are of; see `DecoderModel.texts`."""
        B, T = logits.shape[:2]
        return cast("DecoderModel", self.base_model).texts((B, T), *given, use_cache=use_cache)

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


class CausalLMHead(_Headed, GenerationMixin):
    """Logits of the next token."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_module(self.lm_head)
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the module that turns vectors into logits of ids."""
        return self.lm_head

    def new_cache(self) -> Cache:
        """Return an empty cache of the kind this family grows."""
        return cast("DecoderModel", self.base_model).new_cache()

    def layers_kept(self, cache: Cache | None) -> AbstractContextManager[None]:
        """Take down what layers hold once for all steps inside that go on with a cache."""
        return cast("DecoderModel", self.base_model).layers_kept(cache)

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
        *,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | Tensor | None = None,
        max_length_k: int | Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits (B, T, V) of the token after each; arguments as in `DecoderModel.forward`.

        Args:
            labels: (B, T) ids to predict, -100 where the loss ignores them; they are shifted here.
            logits_to_keep: how many of the last positions to return logits of, 0 for all; or a
                tensor of positions (N,). The loss needs all of them.

        Raises:
            InputError: an argument cannot be used, or two contradict each other.
        """
        packing = Packing(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx)
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
            **packing._asdict(),
        )
        logits = self.lm_head(kept(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            check_labels(labels, logits)
            texts = self.texts(
                logits, packing, attention_mask, position_ids, past_key_values, use_cache=use_cache
            )
            labels = own_labels(labels, texts)
            loss = next_token_loss(logits, labels)
        output = CausalLMOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )
        return cast("CausalLMOutputWithPast", self._returned(output, return_dict))


class SequenceClassificationHead(_Headed):
    """Logits of a whole sequence, read off its last token that is not padding."""

    new_head = ("score.",)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self.init_module(self.score)

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
        *,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | Tensor | None = None,
        max_length_k: int | Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Return logits (B, num_labels); arguments as in `DecoderModel.forward`.

        Args:
            labels: (B,) classes; or (B,), (B, num_labels) numbers for a regression; or
                (B, num_labels) of 0..1 for several labels at once. `config.problem_type` decides
                which, or where it is not set, the number of labels and the dtype.

        Raises:
            InputError: several rows, and neither pad_token_id nor a mask tells where each ends.
        """
        packing = Packing(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx)
        outputs = self._base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packing._asdict(),
        )
        logits = self.score(outputs.last_hidden_state)
        B = logits.shape[0]
        last = self._last_tokens(input_ids, attention_mask, B)
        logits = logits[torch.arange(B, device=logits.device), last]
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels, self._problem_type(labels))
        output = SequenceClassifierOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )
        return cast("SequenceClassifierOutputWithPast", self._returned(output, return_dict))

    def _last_tokens(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, B: int
    ) -> Tensor | int:
        """Return the column of each row's last token that is not padding."""
        pad = self.config.pad_token_id
        if pad is None and attention_mask is not None and attention_mask.ndim == 2:
            columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
            return (columns * (attention_mask != 0)).argmax(dim=-1)
        if input_ids is None or pad is None:
            if B > 1 and pad is None:
                raise InputError(
                    f"a batch of {B} rows needs config.pad_token_id or an attention_mask, to tell "
                    "where each row ends; set model.config.pad_token_id = tokenizer.pad_token_id"
                )
            return -1
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (columns * (input_ids != pad)).argmax(dim=-1)

    def _problem_type(self, labels: Tensor) -> str:
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.num_labels == 1:
            return "regression"
        if labels.is_floating_point():
            return "multi_label_classification"
        return "single_label_classification"


class TokenClassificationHead(_Headed):
    """Logits of each token."""

    new_head = ("score.",)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(0.1 if rate is None else rate)
        self.score = Linear(config.hidden_size, config.num_labels)
        self.init_module(self.score)

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
        *,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | Tensor | None = None,
        max_length_k: int | Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Return logits (B, T, num_labels); arguments as in `DecoderModel.forward`.

        Args:
            labels: (B, T) classes, -100 where the loss ignores them.
        """
        packing = Packing(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx)
        outputs = self._base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packing._asdict(),
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else token_loss(logits, labels)
        output = TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return cast("TokenClassifierOutput", self._returned(output, return_dict))


class QuestionAnsweringHead(_Headed):
    """Logits of where an answer starts and ends."""

    base_model_prefix = "transformer"
    new_head = ("qa_outputs.",)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.qa_outputs = Linear(config.hidden_size, 2)
        self.init_module(self.qa_outputs)

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
        *,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | Tensor | None = None,
        max_length_k: int | Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Return start and end logits (B, T) each; arguments as in `DecoderModel.forward`.

        Args:
            start_positions: (B,) the answer's first token; past the end where it was cut off.
            end_positions: (B,) the answer's last token.

        Raises:
            InputError: one of the two positions without the other.
        """
        packing = Packing(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx)
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
            **packing._asdict(),
        )
        starts, ends = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(starts, ends, start_positions, end_positions)
        output = QuestionAnsweringModelOutput(
            loss, starts, ends, outputs.hidden_states, outputs.attentions
        )
        return cast("QuestionAnsweringModelOutput", self._returned(output, return_dict))


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Check that there is a label for each position that has logits.

    Raises:
        InputError: there is not.
    """
    if labels.shape != logits.shape[:2]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)} and there are logits of "
            f"{tuple(logits.shape[:2])} positions; give a label for each token, and "
            "logits_to_keep=0"
        )


def kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the positions of hidden states (B, T, C) whose logits are wanted.

    Raises:
        InputError: a negative number of positions.
    """
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise InputError(
                f"logits_to_keep={logits_to_keep} has to be 0 for all positions, how many of the "
                "last ones, or a tensor of positions"
            )
        return hidden[:, -logits_to_keep:]
    return hidden[:, logits_to_keep]
