"""The arguments of `generate()`, and checks of their types before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from quintet.cache import Cache, LegacyCache
from quintet.errors import InputError, named
from quintet.generation.plan import Configuring
from quintet.generation.processors.assemble import Processor
from quintet.generation.processors.words import PrefixAllowedTokens
from quintet.generation.sampler import Generators
from quintet.generation.speculative.factory import AssistantModel
from quintet.generation.stopping import Criterion
from quintet.generation.streamers import Streamer
from quintet.tokenization import PreTrainedTokenizer


@runtime_checkable
class _Decoding(Protocol):
    """Any tokenizer that decodes ids."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class _Knowing(Protocol):
    """Any tokenizer with a vocabulary."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of `generate()` by their names; None for those not given."""

    inputs: Tensor | Mapping[str, Tensor] | None = None
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    past_key_values: Cache | LegacyCache | None = None
    negative_prompt_ids: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    generation_config: Configuring | Sequence[Configuring] | None = None
    options: Mapping[str, Any]
    logits_processor: Sequence[Processor] | None = None
    stopping_criteria: Sequence[Criterion] | None = None
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None
    tokenizer: PreTrainedTokenizer | None = None
    assistant_model: AssistantModel | None = None
    assistant_tokenizer: PreTrainedTokenizer | None = None
    streamer: Streamer | None = None
    generator: Generators | None = None
    adapter_names: Sequence[str | None] | None = None

    def shared(self) -> dict[str, object]:
        """Return the values that all processes of a sharded model have to share.

        What only the process that chooses uses, such as a streamer or a generator, is not in it.
        """
        own = ("streamer", "generator", "assistant_tokenizer", "past_key_values")
        return {name: value for name, value in vars(self).items() if name not in own}

    def check(self) -> None:
        """Check that each is None or of its type.

        Raises:
            InputError: one is something else.
        """
        for name in ("logits_processor", "stopping_criteria"):
            value = vars(self)[name]
            if value is not None and not (
                isinstance(value, Sequence)
                and not isinstance(value, str | bytes)
                and all(callable(one) for one in value)
            ):
                raise _refused(name, value, "a list of functions of (input_ids, scores)")
        function: object = self.prefix_allowed_tokens_fn
        if function is not None and not callable(function):
            rule = "a function of a row's index and its ids that names the ids that may come"
            raise _refused("prefix_allowed_tokens_fn", function, rule)
        for name in ("tokenizer", "assistant_tokenizer"):
            value = vars(self)[name]
            if value is not None and (
                isinstance(value, type) or not isinstance(value, _Decoding | _Knowing)
            ):
                raise _refused(name, value, "a tokenizer, such as AutoTokenizer.from_pretrained(…)")
        assistant: object = self.assistant_model
        if assistant is not None and not (
            isinstance(assistant, AssistantModel) and callable(assistant)
        ):
            rule = "a model of quintet, such as AutoModelForCausalLM.from_pretrained(…)"
            raise _refused("assistant_model", assistant, rule)
        streamer: object = self.streamer
        if streamer is not None and (
            isinstance(streamer, type) or not isinstance(streamer, Streamer)
        ):
            raise _refused("streamer", streamer, "a streamer, with put(value) and end()")


def check_logits_to_keep(given: object) -> None:
    """Check what changes no text, and is taken.

    Raises:
        InputError: it is no number of positions.
    """
    if given is not None and (type(given) is not int or given < 0):
        raise _refused("logits_to_keep", given, "a number of positions, an integer of at least 0")


def _refused(name: str, given: object, rule: str) -> InputError:
    return InputError(f"{name} is a {named(given)}; it has to be {rule}")
