"""Chooses the drafter for the options."""

import warnings
from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

from quintet.cache import Cache
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError
from quintet.generation.config import GenerationConfig
from quintet.generation.decode import LanguageModel
from quintet.generation.speculative.candidates import Drafter, DraftSchedule, PromptLookup
from quintet.generation.speculative.draft_model import DraftModel
from quintet.generation.speculative.drafting import Drafting, PredictedDrafting, TextDrafting
from quintet.generation.speculative.mtp import MTPDrafter
from quintet.generation.speculative.prediction import MTPModel
from quintet.parallel.experts import lockstep_of
from quintet.tokenization import PreTrainedTokenizer

# What is drafted for each row where no number is given.
ASSISTANT_TOKENS = 5
NGRAM = 2
# What says how a draft is written, where it is not looked up.
_OF_WRITERS = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
)


@runtime_checkable
class AssistantModel(Protocol):
    """Interface of an assistant model."""

    config: PreTrainedConfig
    generation_config: GenerationConfig

    def new_cache(self) -> Cache:
        """Return an empty cache of the kind the model grows."""
        ...


def check_drafting(
    model: object,
    config: GenerationConfig,
    assistant: AssistantModel | None,
    tokenizer: PreTrainedTokenizer | None,
    assistant_tokenizer: PreTrainedTokenizer | None,
    *,
    rows: int,
    padded: bool,
    has_ids: bool,
) -> bool:
    """Check the options of speculation, and return whether they turn it on.

    Raises:
        InputError: two ways of drafting, one that this model has not, or one beside options that
            it cannot go with.
    """
    ways = {
        "assistant_model": assistant is not None,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "use_mtp": bool(config.use_mtp),
    }
    requested = [name for name, is_requested in ways.items() if is_requested]
    if not requested:
        return False
    if len(requested) > 1:
        raise InputError(f"{' and '.join(requested)} are ways of drafting; give one of them")
    (drafter,) = requested
    if (config.num_beams or 1) > 1:
        raise InputError(
            f"{drafter} drafts for rows that go on one by one; leave it out, or num_beams="
            f"{config.num_beams}"
        )
    if config.guidance_scale not in (None, 1):
        raise InputError(
            f"{drafter} cannot go with guidance_scale={config.guidance_scale}, which runs over "
            "every token once, and drafted tokens are taken back; leave one of the two out"
        )
    if (config.output_attentions or config.output_hidden_states) and rows > 1:
        raise InputError(
            f"with {drafter}, output_attentions and output_hidden_states are there for one row, as "
            "rows take different numbers of tokens in a step"
        )
    if config.output_attentions and padded:
        raise InputError(
            f"with {drafter}, output_attentions are there for a row without padding; cut it off"
        )
    if drafter != "use_mtp" and not has_ids:
        raise InputError(f"{drafter} reads the ids of the prompt, and inputs_embeds has none")
    if assistant is not None:
        _check_assistant(model, assistant, tokenizer, assistant_tokenizer)
    if drafter == "use_mtp":
        if not isinstance(model, MTPModel) or not model.prediction_depth():
            raise InputError(
                f"use_mtp=True needs layers of multi-token prediction, and this "
                f"{type(model).__name__} has none; load a DeepSeek-V3 checkpoint that has them"
            )
        if config.use_cache is False:
            raise InputError("use_mtp=True needs a cache; leave use_cache=False out")
    return True


def warn_of_idle_drafting(
    config: GenerationConfig,
    options: Mapping[str, Any],
    assistant: AssistantModel | None,
    assistant_tokenizer: PreTrainedTokenizer | None,
) -> None:
    """Warn of drafting options that have no effect."""
    writes = assistant is not None or bool(config.use_mtp)
    idle = [] if writes else [(name, "assistant_model or use_mtp=True") for name in _OF_WRITERS]
    if config.prompt_lookup_num_tokens is None:
        idle.append(("max_matching_ngram_size", "prompt_lookup_num_tokens"))
    given = {**options, "assistant_tokenizer": assistant_tokenizer}
    if assistant is None:
        idle.append(("assistant_tokenizer", "assistant_model"))
    for name, needed in idle:
        if given.get(name) is not None:
            option = name if name == "assistant_tokenizer" else f"{name}={given[name]!r}"
            warnings.warn(f"{option} has no effect without {needed}", stacklevel=5)


def make_drafter(
    model: object,
    config: GenerationConfig,
    assistant: AssistantModel | None,
    cache: Cache | None,
    vocab_size: int,
) -> Drafter:
    """Make the drafter of `generate()`; call `check_drafting` first."""
    if config.use_mtp:
        assert cache is not None
        least = config.assistant_confidence_threshold or 0.0
        return MTPDrafter(cast("MTPModel", model), cache, threshold=least)
    if assistant is None:
        return PromptLookup(config.max_matching_ngram_size or NGRAM)
    own, requested = assistant.generation_config, config.assistant_confidence_threshold
    threshold = own.assistant_confidence_threshold if requested is None else requested
    return DraftModel(
        cast("LanguageModel", assistant),
        assistant.new_cache(),
        known=assistant.config.vocab_size,
        vocab_size=vocab_size,
        threshold=threshold or 0.0,
    )


def make_drafting(
    model: object, config: GenerationConfig, assistant: AssistantModel | None, vocab_size: int
) -> Drafting:
    """Make the drafting of an engine's sequence; call `check_drafting` first."""
    schedule = make_schedule(model, config, assistant)
    if config.use_mtp:
        return PredictedDrafting(schedule, config.assistant_confidence_threshold or 0.0)
    return TextDrafting(make_drafter(model, config, assistant, None, vocab_size), schedule)


def make_schedule(
    model: object, config: GenerationConfig, assistant: AssistantModel | None
) -> DraftSchedule:
    """Return the schedule of the call, else of the assistant's config."""
    if config.prompt_lookup_num_tokens is not None:
        return DraftSchedule(config.prompt_lookup_num_tokens)
    tokens, name = config.num_assistant_tokens, config.num_assistant_tokens_schedule
    if assistant is not None:
        own = assistant.generation_config
        tokens = tokens or own.num_assistant_tokens or ASSISTANT_TOKENS
        name = name or own.num_assistant_tokens_schedule
    else:
        tokens = tokens or cast("MTPModel", model).prediction_depth()
    return DraftSchedule(tokens, name or "constant")


def _check_assistant(
    model: object,
    assistant: AssistantModel,
    tokenizer: PreTrainedTokenizer | None,
    assistant_tokenizer: PreTrainedTokenizer | None,
) -> None:
    if lockstep_of(assistant) is not None:
        raise InputError(
            "the assistant_model exchanges experts' tokens with processes that have texts of their "
            "own, which are at other places when it drafts; load it whole, or with ep_size up to "
            "tp_size"
        )
    own, other = (cast("AssistantModel", m).config.vocab_size for m in (model, assistant))
    if tokenizer is not None and assistant_tokenizer is not None:
        if tokenizer.get_vocab() != assistant_tokenizer.get_vocab():
            raise InputError(
                "the tokenizers of model and assistant_model differ, so that the ids of one mean "
                "something else to the other; choose an assistant with the same tokenizer"
            )
    elif own != other:
        # The same tokenizer is often padded to other sizes, which the ids cannot tell.
        raise InputError(
            f"the model has a vocabulary of {own} and the assistant_model of {other}; if they have "
            "the same tokenizer, show it by generate(tokenizer=…, assistant_tokenizer=…)"
        )
