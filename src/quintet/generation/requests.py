"""Builds an engine's sequence from the arguments of `generate()`."""

from collections import abc
from operator import index
from typing import Any, Protocol

import torch
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.generation import plan
from quintet.generation.arguments import Arguments
from quintet.generation.config import GenerationConfig
from quintet.generation.processors.assemble import Setting, assemble
from quintet.generation.prompt import read_prompt
from quintet.generation.rows import Cached
from quintet.generation.sampler import Sampler, row_generators
from quintet.generation.sequence import Sequence
from quintet.generation.speculative.factory import (
    check_drafting,
    make_drafting,
    warn_of_idle_drafting,
)
from quintet.generation.token_buffer import TokenBuffer

# What these ask for is no affair of one sequence, and the values that ask for nothing.
_OF_A_CALL: abc.Mapping[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1),
    "token_healing": (None, False),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "max_cache_len": (None,),
    "prefill_chunk_size": (None,),
    "compile": (None, False),
    "compile_config": (None,),
    "return_dict_in_generate": (None, False),
}


class Served(Cached, Protocol):
    """Interface of a model that an engine runs."""

    generation_config: GenerationConfig


@torch.no_grad()
def sequence_of(model: Served, inputs: Tensor | abc.Sequence[int], given: Arguments) -> Sequence:
    """Build the sequence of `Engine.sequence` from a prompt's ids and the other arguments."""
    given.check()
    config = plan.configured(model.generation_config, given.generation_config, given.options)
    assistant, assistant_tokenizer = given.assistant_model, given.assistant_tokenizer
    warn_of_idle_drafting(config, given.options, assistant, assistant_tokenizer)
    _check_of_a_sequence(config)
    size, device = model.config.vocab_size, model.device
    ids = _row(inputs)
    prompt = read_prompt(ids, None, None, None, None, vocab_size=size, device=device)
    criteria = list(given.stopping_criteria or ())
    context = model.config.max_position_embeddings
    max_new_tokens = plan.max_new_tokens_of(prompt, config, plan.longest(criteria), context)
    plan.check_least(config, max_new_tokens, size)
    setting = Setting(
        prompt=TokenBuffer(prompt.ids),
        max_new_tokens=max_new_tokens,
        vocab_size=size,
        prefix_allowed_tokens_fn=given.prefix_allowed_tokens_fn,
    )
    sampler = Sampler(
        assemble(config, setting, given.logits_processor or ()),
        do_sample=bool(config.do_sample),
        generators=row_generators(given.generator, 1, 1, device),
    )
    stopping = plan.stopping(config, criteria, given.tokenizer, device)
    drafting = None
    if check_drafting(
        model,
        config,
        assistant,
        given.tokenizer,
        assistant_tokenizer,
        rows=1,
        padded=False,
        has_ids=True,
    ):
        drafting = make_drafting(model, config, assistant, size)
    return Sequence(
        prompt.ids[0].tolist(), sampler, stopping, max_new_tokens, given.streamer, drafting
    )


def _row(inputs: Tensor | abc.Sequence[int]) -> Tensor:
    if not isinstance(inputs, Tensor):
        inputs = _tensor(inputs)
    if inputs.ndim == 2 and len(inputs) != 1:
        raise InputError(
            f"the prompt has {len(inputs)} rows; a sequence is one text, so make one for each"
        )
    return inputs[None] if inputs.ndim == 1 else inputs


def _tensor(inputs: object) -> Tensor:
    """Return ids that are no tensor, as a list or an array, as one.

    Raises:
        InputError: what is no list, or holds what is no id: a fraction would be cut off.
    """
    try:
        return torch.tensor(_ids(inputs), dtype=torch.long, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(
            f"the prompt is {shown(inputs)}; it has to be a tensor, or a list of ids, which are "
            "whole numbers"
        ) from None


def _ids(given: Any) -> Any:
    if isinstance(given, str | bytes | abc.Mapping):
        raise TypeError
    return [_id(one) for one in given]


def _id(one: Any) -> Any:
    """Return an id, or those of a row."""
    if isinstance(one, bool):
        raise TypeError
    try:
        return index(one)
    except TypeError:
        return _ids(one)


def _check_of_a_sequence(config: GenerationConfig) -> None:
    for name, nothing in _OF_A_CALL.items():
        value = vars(config)[name]
        if not any(value is one or value == one for one in nothing):
            raise InputError(
                f"{name}={shown(value)} is no option of one sequence in an engine; set it to "
                f"{nothing[0]!r}, or use generate()"
            )
