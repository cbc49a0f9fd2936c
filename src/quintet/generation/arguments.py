"""Type checks of `generate()`'s arguments, before anything runs."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from quintet.errors import InputError, named
from quintet.generation.speculative.factory import AssistantModel
from quintet.generation.streamers import Streamer


@runtime_checkable
class _Decoding(Protocol):
    """Any tokenizer that decodes ids."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class _Knowing(Protocol):
    """Any tokenizer with a vocabulary."""

    def get_vocab(self) -> dict[str, int]: ...


def check_arguments(
    *,
    logits_processor: object,
    stopping_criteria: object,
    prefix_allowed_tokens_fn: object,
    tokenizer: object,
    assistant_model: object,
    assistant_tokenizer: object,
    streamer: object,
    logits_to_keep: object,
) -> None:
    """Check that each argument is None or of its type.

    Raises:
        InputError: one is something else.
    """
    for name, given in (
        ("logits_processor", logits_processor),
        ("stopping_criteria", stopping_criteria),
    ):
        if given is not None and not (
            isinstance(given, Sequence)
            and not isinstance(given, str | bytes)
            and all(callable(one) for one in given)
        ):
            raise _refused(name, given, "a list of functions of (input_ids, scores)")
    if prefix_allowed_tokens_fn is not None and not callable(prefix_allowed_tokens_fn):
        rule = "a function of a row's index and its ids that names the ids that may come"
        raise _refused("prefix_allowed_tokens_fn", prefix_allowed_tokens_fn, rule)
    for name, given in (("tokenizer", tokenizer), ("assistant_tokenizer", assistant_tokenizer)):
        if given is not None and (
            isinstance(given, type) or not isinstance(given, _Decoding | _Knowing)
        ):
            raise _refused(name, given, "a tokenizer, such as AutoTokenizer.from_pretrained(…)")
    if assistant_model is not None and not (
        isinstance(assistant_model, AssistantModel) and callable(assistant_model)
    ):
        rule = "a model of quintet, such as AutoModelForCausalLM.from_pretrained(…)"
        raise _refused("assistant_model", assistant_model, rule)
    if streamer is not None and (isinstance(streamer, type) or not isinstance(streamer, Streamer)):
        raise _refused("streamer", streamer, "a streamer, with put(value) and end()")
    if logits_to_keep is not None and (type(logits_to_keep) is not int or logits_to_keep < 0):
        rule = "a number of positions, an integer of at least 0"
        raise _refused("logits_to_keep", logits_to_keep, rule)


def _refused(name: str, given: object, rule: str) -> InputError:
    return InputError(f"{name} is a {named(given)}; it has to be {rule}")
