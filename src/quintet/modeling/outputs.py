"""The outputs of forwards: fields by name, by key, or by index among those that are set."""

from dataclasses import dataclass

from torch import Tensor

from quintet.cache import Cache, LegacyCache
from quintet.modeloutput import ModelOutput, deferrable

__all__ = [
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "ModelOutput",
    "MoeCausalLMOutputWithPast",
    "MoeModelOutputWithPast",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutputWithPast",
    "TokenClassifierOutput",
]


@dataclass(eq=False)
class BaseModelOutputWithPast(ModelOutput):
    """The output of a model without a head.

    Shapes: last_hidden_state (B, T, C); hidden_states L + 1 of (B, T, C), the embeddings first and
    the last one normalised; attentions L of (B, H, T, S).
    """

    last_hidden_state: Tensor
    past_key_values: Cache | LegacyCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class CausalLMOutputWithPast(ModelOutput):
    """Output of a language model: logits (B, T, V), and a scalar loss if labels were given.

    With labels, the logits are made when they are first read: the loss does without them.
    """

    loss: Tensor | None = None
    logits: Tensor | None = deferrable()  # noqa: RUF009
    past_key_values: Cache | LegacyCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class MoeModelOutputWithPast(BaseModelOutputWithPast):
    """The output of a mixture-of-experts model without a head.

    Shapes: as `BaseModelOutputWithPast`; router_logits (B·T, E) for each layer with experts, what
    the router computed before any softmax or sigmoid.
    """

    router_logits: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class MoeCausalLMOutputWithPast(ModelOutput):
    """The output of a mixture-of-experts language model; aux_loss is the balance of the experts.

    Shapes: logits (B, T, V), router_logits (B·T, E) for each layer with experts, mtp_logits
    (B, T, V) for each depth of multi-token prediction that was asked for, mtp_loss a scalar. With
    labels, the logits are made when they are first read.
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = deferrable()  # noqa: RUF009
    past_key_values: Cache | LegacyCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    mtp_logits: tuple[Tensor, ...] | None = None
    mtp_loss: Tensor | None = None


@dataclass(eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """The output of a sequence classifier; logits (B, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | LegacyCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class TokenClassifierOutput(ModelOutput):
    """The output of a token classifier; logits (B, T, num_labels)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class QuestionAnsweringModelOutput(ModelOutput):
    """The output of an extractive question answerer; both logits (B, T)."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
