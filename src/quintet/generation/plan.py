"""Turns config and arguments of `generate()` into search, limits and criteria."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from quintet.cache import Cache, from_legacy
from quintet.errors import ContextLengthError, InputError, named, shown
from quintet.generation.beams import BeamOptions
from quintet.generation.config import NEW_TOKENS, GenerationConfig
from quintet.generation.prompt import Prompt
from quintet.generation.stopping import (
    Criterion,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    Stopping,
    StoppingCriteriaList,
    StopStringCriteria,
)
from quintet.generation.streamers import Streamer
from quintet.tokenization import PreTrainedTokenizer


def beam_options(config: GenerationConfig, streamer: Streamer | None) -> BeamOptions | None:
    """Return the options of a beam search, or None without beams.

    Raises:
        InputError: more sequences are asked for than there will be, or a streamer.
    """
    beams, returned = config.num_beams or 1, config.num_return_sequences or 1
    if beams == 1:
        if returned > 1 and not config.do_sample:
            raise InputError(
                f"num_return_sequences={returned} without sampling would be "
                "the same text each time; set do_sample=True, or num_beams"
            )
        return None
    if returned > beams:
        raise InputError(
            f"num_return_sequences={returned} is more than the num_beams={beams} there are; "
            "raise num_beams"
        )
    if streamer is not None:
        raise InputError(
            f"a streamer gets tokens as they are chosen, and with num_beams={beams} none is before "
            "the end; leave one of the two out"
        )
    penalty, early = config.length_penalty, config.early_stopping
    return BeamOptions(
        num_beams=beams,
        num_return_sequences=returned,
        length_penalty=1.0 if penalty is None else penalty,
        early_stopping=False if early is None else early,
        eos_count=len(config.eos_token_ids),
    )


def beginning(
    config: GenerationConfig, positions: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return the first token without a prompt, (1, 1), or None if undefined."""
    if config.bos_token_id is None or positions is not None:
        return None
    return torch.tensor([[config.bos_token_id]], device=device, dtype=torch.long)


def longest(criteria: Sequence[Criterion]) -> int | None:
    """Return the length at which a criterion of the caller ends all rows."""
    return StoppingCriteriaList(criteria).max_length


def stopping(
    config: GenerationConfig,
    own: Sequence[Criterion],
    tokenizer: PreTrainedTokenizer | None,
    device: torch.device,
) -> Stopping:
    """Collect the stopping criteria; a caller's replaces one of the same class.

    Raises:
        InputError: there are stop strings and no tokenizer.
    """
    configured: list[Criterion] = []
    if config.max_time is not None:
        configured.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise InputError(
                f"stop_strings={shown(config.stop_strings)} needs the tokenizer: "
                "generate(tokenizer=…)"
            )
        configured.append(StopStringCriteria(tokenizer, config.stop_strings))
    kinds = {type(criterion) for criterion in own}
    ends = [] if EosTokenCriteria in kinds else config.eos_token_ids
    criteria = [criterion for criterion in configured if type(criterion) not in kinds]
    # Its length is that of the loop already.
    criteria += [criterion for criterion in own if type(criterion) is not MaxLengthCriteria]
    eos = torch.tensor(ends, dtype=torch.long, device=device)
    return Stopping(eos, StoppingCriteriaList(criteria))


def configured(
    own: GenerationConfig, given: object, options: Mapping[str, Any]
) -> GenerationConfig:
    """Merge the call's options over its config over the model's.

    Raises:
        InputError: what is given is no config, or an option is unknown or breaks its rule.
    """
    config = own if given is None else read_config(given).over(own)
    config = config.usual().overridden(**options)
    warn_of_idle(config, options)
    return config


def warn_of_idle(config: GenerationConfig, options: Mapping[str, Any]) -> None:
    """Warn of options of a call that have no effect."""
    for name, value, needed in config.idle(options):
        warnings.warn(f"{name}={value} has no effect without {needed}", stacklevel=6)


def check_cache(
    config: GenerationConfig,
    options: Mapping[str, Any],
    past: object,
    mask: Tensor | None,
    layers: int,
) -> Cache | None:
    """Return the cache to continue from, converted from legacy tuples; None for none.

    Raises:
        InputError: it is no cache, or an option asks for another one, or for none.
    """
    if past is None:
        if config.max_cache_len is not None and config.cache_implementation != "static":
            warnings.warn(
                f"max_cache_len={config.max_cache_len} has no effect without "
                "cache_implementation='static'",
                stacklevel=5,
            )
        return None
    for name in ("use_cache", "cache_implementation"):
        if (value := options.get(name)) is not None and value is not True:
            raise InputError(
                f"{name}={shown(value)} and past_key_values contradict each other: what is given "
                "is gone on with; leave one of the two out"
            )
    if isinstance(past, tuple):
        seen = None if mask is None else mask[:, : past[0][0].shape[2]]
        return from_legacy(past, seen, layers)
    if not isinstance(past, Cache):
        raise InputError(
            f"past_key_values is a {named(past)}; it has to be a Cache, such as "
            "DynamicCache(model.config)"
        )
    return past


def check_least(config: GenerationConfig, max_new_tokens: int, vocab_size: int) -> None:
    """Check that `min_new_tokens` fits and that ends can be suppressed.

    Raises:
        InputError: one is missing.
    """
    if config.min_new_tokens is None:
        return
    if config.min_new_tokens > max_new_tokens:
        raise InputError(
            f"min_new_tokens={config.min_new_tokens} and there is room for {max_new_tokens} new "
            "tokens; raise max_new_tokens, or lower min_new_tokens"
        )
    if any(token >= vocab_size for token in config.eos_token_ids):
        raise InputError(
            f"eos_token_id={config.eos_token_id} is outside of the vocabulary, 0 to "
            f"{vocab_size - 1}"
        )


def max_new_tokens_of(
    prompt: Prompt, config: GenerationConfig, max_length: int | None, context: int
) -> int:
    """Return the maximum number of new tokens in a context.

    Raises:
        ContextLengthError: the prompt fills it.
        InputError: the prompt is longer than it may be with the text.
    """
    length = prompt.length
    if length >= context:
        raise ContextLengthError(
            f"the prompt has {length} tokens and the model's context is {context} "
            "(max_position_embeddings), with none left to generate; shorten the prompt"
        )
    if max_length is None and config.max_new_tokens is None:
        max_length = config.max_length
    if max_length is not None:
        wanted = max_length - prompt.width
        if wanted < 1:
            raise InputError(
                f"the prompt has {prompt.width} tokens and max_length={max_length} counts "
                "them; set max_new_tokens, or a larger max_length"
            )
    else:
        wanted = config.max_new_tokens or NEW_TOKENS
    if length + wanted > context:
        warnings.warn(
            f"a prompt of {length} and {wanted} new tokens do not fit the model's context of "
            f"{context}; at most {context - length} are made",
            stacklevel=5,
        )
    return min(wanted, context - length)


@runtime_checkable
class Configuring(Protocol):
    """A generation config, ours or another library's."""

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the options that are set."""
        ...


def read_config(given: object) -> GenerationConfig:
    """Convert a config with the same names to ours.

    Raises:
        InputError: it is none, or sets what cannot be read.
    """
    if isinstance(given, GenerationConfig):
        return given
    if isinstance(given, type) or not isinstance(given, Configuring):
        raise InputError(
            f"generation_config is a {named(given)}; it has to be "
            "quintet's GenerationConfig, or that of Transformers"
        )
    values = {name: value for name, value in given.to_diff_dict().items() if value is not None}
    return GenerationConfig.from_dict(values, source="generation_config")


def pad_token(config: GenerationConfig) -> int:
    """Return the token that fills rows after their end."""
    if config.pad_token_id is not None:
        return config.pad_token_id
    return config.eos_token_ids[0] if config.eos_token_ids else 0
