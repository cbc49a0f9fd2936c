"""`generate()` with a config per row: an engine run to the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation import plan
from quintet.generation.engine import Engine
from quintet.generation.following import follow, leading
from quintet.generation.processors.assemble import Processor
from quintet.generation.processors.words import PrefixAllowedTokens
from quintet.generation.prompt import Prompt
from quintet.generation.requests import Served, sequence_of
from quintet.generation.sampler import Generators, row_generators
from quintet.generation.sequence import Sequence as Row
from quintet.generation.speculative.factory import AssistantModel
from quintet.generation.stopping import Criterion
from quintet.parallel.agree import Agreement
from quintet.tokenization import PreTrainedTokenizer


def check_own_options(**given: object) -> None:
    """Refuse arguments that rows with configs of their own cannot share.

    Raises:
        InputError: something is.
    """
    for name, value in given.items():
        if value is not None:
            raise InputError(
                f"{name} goes with one generation_config for all rows, and this is a list of them; "
                "leave it out, or make a quintet Engine and a sequence for each text"
            )


def generate_each(
    model: Served,
    prompt: Prompt,
    configs: Sequence[plan.Configuring],
    logits_processor: Sequence[Processor] | None,
    stopping_criteria: Sequence[Criterion] | None,
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None,
    *,
    tokenizer: PreTrainedTokenizer | None,
    assistant_model: AssistantModel | None,
    assistant_tokenizer: PreTrainedTokenizer | None,
    generator: Generators | None,
    options: Mapping[str, Any],
) -> Tensor:
    """Continue each row with its own config, (B, T + new), in one batch.

    What reads texts, and the caller's own processors and criteria, get one row at a time.

    Raises:
        InputError: not as many configs as rows, or an option that is no affair of one row.
        ContextLengthError: a prompt fills the model's context.
    """
    if len(configs) != len(prompt.ids):
        raise InputError(
            f"generation_config is a list of {len(configs)} and the prompt has {len(prompt.ids)} "
            "rows; give one config for each, or one for all"
        )

    def made() -> Tensor:
        ids, padding = prompt.ids, prompt.padding
        starts = [0] * len(ids) if padding is None else padding.tolist()
        generators = row_generators(generator, len(ids), 1, ids.device)
        sequences = [
            sequence_of(
                model,
                own[start:].tolist(),
                config,
                logits_processor,
                stopping_criteria,
                _of_row(prefix_allowed_tokens_fn, row),
                tokenizer=tokenizer,
                assistant_model=assistant_model,
                assistant_tokenizer=assistant_tokenizer,
                streamer=None,
                generator=None if generators is None else generators[row],
                options=options,
            )
            for row, (own, start, config) in enumerate(zip(ids, starts, configs, strict=True))
        ]
        _finish(model, sequences)
        longest = max(len(sequence.new) for sequence in sequences)
        pads = [
            plan.pad_token(plan.configured(model.generation_config, c, options)) for c in configs
        ]
        new = [
            sequence.new + [pad] * (longest - len(sequence.new))
            for sequence, pad in zip(sequences, pads, strict=True)
        ]
        made = torch.tensor(new, device=ids.device, dtype=torch.long)
        return torch.cat((prompt.given, made), dim=1)

    agreement = Agreement.of(model.world)
    if agreement is None:
        return made()
    if not agreement.decides:
        follow(model)

    def lead() -> Tensor:
        with leading(model):
            return made()

    return agreement.decided(lead, prompt.ids.device)


def _finish(model: Served, sequences: Sequence[Row]) -> None:
    """Run all sequences to their ends, in shared steps."""
    engine = Engine(model, len(sequences), max(one.prompt_length + one.room for one in sequences))
    for sequence in sequences:
        engine.add(sequence)
    while not all(sequence.finished for sequence in sequences):
        engine.step(sequences)
        for sequence in sequences:
            if sequence.error is not None:
                raise sequence.error


def _of_row(allowed: PrefixAllowedTokens | None, row: int) -> PrefixAllowedTokens | None:
    """Bind the row index of a function of (row, ids)."""
    return None if allowed is None else lambda _, ids: allowed(row, ids)
