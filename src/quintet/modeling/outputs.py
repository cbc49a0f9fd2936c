"""What forward returns: fields by name, by key, or by place among those that are set."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from quintet.cache import Cache, LegacyCache

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


class ModelOutput(Mapping[str, Any]):
    """A dataclass that also indexes like a tuple (`out[0]`) and a dict (`out["logits"]`).

    Fields that are None do not count: they have no place, and are not among the keys.
    """

    def __getitem__(self, key: Any) -> Any:
        """Return a field by name, or by place (an int or a slice)."""
        if isinstance(key, str):
            return dict(self._set_fields())[key]
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._set_fields())

    def __len__(self) -> int:
        return len(self._set_fields())

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are set, in order."""
        return tuple(value for _, value in self._set_fields())

    def _set_fields(self) -> list[tuple[str, Any]]:
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return [(name, value) for name, value in pairs if value is not None]


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
    """The output of a language model; logits (B, T, V), loss a scalar where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
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
    (B, T, V) for each depth of multi-token prediction that was asked for, mtp_loss a scalar.
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
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
