"""Builds the return value of `generate()`."""

import torch
from torch import Tensor

from quintet.generation.beams import BeamSearchResult
from quintet.generation.decode import Generation
from quintet.generation.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    Speculation,
)
from quintet.generation.prompt import Prompt


def output(
    run: Generation, prompt: Prompt, copies: int, speculation: Speculation | None = None
) -> Tensor | GenerateDecoderOnlyOutput:
    """Return the rows of a finished generation, with the record if requested."""
    sequences = behind_given(run.text.ids, prompt, copies)
    if not run.record.wanted:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        past_key_values=run.forward.cache,
        speculation=speculation,
        **run.record.fields(),
    )


def behind_given(ids: Tensor, prompt: Prompt, copies: int) -> Tensor:
    """Return ids (B, T + new) with the prompts as given."""
    given = prompt.given.repeat_interleave(copies, dim=0)
    return torch.cat((given, ids[:, given.shape[1] :]), dim=1)


def beam_output(
    run: Generation, prompt: Prompt, found: BeamSearchResult
) -> Tensor | GenerateBeamDecoderOnlyOutput:
    """Return the best rows of a beam search, with the record if requested."""
    copies = len(found.tokens) // len(prompt.given)
    given = prompt.given.repeat_interleave(copies, dim=0)
    sequences = torch.cat((given, found.tokens), dim=1)
    if not run.record.wanted:
        return sequences
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,
        sequences_scores=None if run.record.scores is None else found.scores,
        beam_indices=found.rows,
        past_key_values=run.forward.cache,
        **run.record.fields(),
    )
