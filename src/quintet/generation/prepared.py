"""Forwards through a replaced `prepare_inputs_for_generation`, as prompt tuning does."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation.config import GenerationConfig
from quintet.generation.decode import ModelRunner
from quintet.generation.outputs import ForwardOutput
from quintet.generation.prompt import Prompt
from quintet.generation.token_buffer import TokenBuffer

Prepare = Callable[..., dict[str, Any]]


class PreparedForward(ModelRunner):
    """The forwards of one generation with arguments prepared by the caller's method.

    It sees the whole text at every step, and may put something in front of a prompt.
    """

    prepare: Prepare

    def prefill(
        self, prompt: Prompt, *, chunk: int | None = None, copies: int = 1
    ) -> ForwardOutput:
        """Run a prompt as prepared."""
        text = TokenBuffer(prompt.ids, prompt.padding)
        new = prompt.width if self.cache is not None and self.cache.get_seq_length() else None
        output = self._prepared(text, new, 1, first=True)
        if copies > 1 and self.cache is not None:
            self.cache.batch_repeat_interleave(copies)
        return output.repeat(copies)

    def step(
        self, text: TokenBuffer, rows: Tensor | None = None, *, new: int = 1, keep: int = 1
    ) -> ForwardOutput:
        """Run the last `new` tokens as prepared."""
        return self._prepared(text, None if self.cache is None else new, keep)

    def _prepared(
        self, text: TokenBuffer, new: int | None, keep: int, *, first: bool = False
    ) -> ForwardOutput:
        cache = self.cache
        holds = cache is not None and cache.get_seq_length() > 0
        # What prepares may bring a cache of its own, and does where there is none.
        inputs = self.prepare(
            text.ids,
            next_sequence_length=new,
            past_key_values=cache if holds else None,
            attention_mask=text.mask().to(torch.long),
            use_cache=cache is not None,
            is_first_iteration=first,
            output_attentions=self._weighs,
            output_hidden_states=self._keeps,
            logits_to_keep=keep,
            return_dict=True,
        )
        output = cast("Any", self.model)(**inputs)
        if cache is not None:
            self.cache = output.past_key_values
        return ForwardOutput(output.logits, output.attentions, output.hidden_states)


def check_prepared(config: GenerationConfig, prompt: Prompt, *, speculates: bool) -> None:
    """Refuse options that do not work with prepared arguments.

    Raises:
        InputError: such an option is set.
    """
    given = {
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        "an assistant, or another way of drafting": speculates,
        "compile": config.compiles,
        "cache_implementation": config.cache_implementation not in (None, "dynamic"),
        "inputs_embeds": prompt.inputs.ndim != 2,
    }
    named = [name for name, is_given in given.items() if is_given]
    if named:
        raise InputError(
            f"{named[0]} cannot be used while prepare_inputs_for_generation is another than the "
            "model's own, as it is under prompt tuning; leave it out"
        )
