"""`generate()` with a config per row: an engine run to the end."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation import plan
from quintet.generation.arguments import Arguments
from quintet.generation.engine import Engine
from quintet.generation.following import follow, leading
from quintet.generation.processors.words import PrefixAllowedTokens
from quintet.generation.prompt import read_prompt
from quintet.generation.requests import Served, sequence_of
from quintet.generation.sampler import row_generators
from quintet.generation.sequence import Sequence as Row
from quintet.parallel.agree import Agreement

# What rows with configs of their own cannot share.
_OF_ONE_CONFIG = (
    "inputs_embeds",
    "position_ids",
    "past_key_values",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "streamer",
    "adapter_names",
)


def generate_each(model: Served, given: Arguments, configs: Sequence[plan.Configuring]) -> Tensor:
    """Continue each row with its own config, (B, T + new), in one batch.

    What reads texts, and the caller's own processors and criteria, get one row at a time.

    Raises:
        InputError: not as many configs as rows, an option that is no affair of one row, or an
            argument that goes with one config for all.
        ContextLengthError: a prompt fills the model's context.
    """
    for name in _OF_ONE_CONFIG:
        if vars(given)[name] is not None:
            raise InputError(
                f"{name} goes with one generation_config for all rows, and this is a list of them; "
                "leave it out, or make a quintet Engine and a sequence for each text"
            )
    prompt = read_prompt(
        given.inputs,
        given.input_ids,
        None,
        given.attention_mask,
        None,
        vocab_size=model.config.vocab_size,
        device=model.device,
    )
    if len(configs) != len(prompt.ids):
        raise InputError(
            f"generation_config is a list of {len(configs)} and the prompt has {len(prompt.ids)} "
            "rows; give one config for each, or one for all"
        )

    def run() -> Tensor:
        ids, padding = prompt.ids, prompt.padding
        starts = [0] * len(ids) if padding is None else padding.tolist()
        generators = row_generators(given.generator, len(ids), 1, ids.device)
        sequences = [
            sequence_of(
                model,
                own[start:].tolist(),
                replace(
                    given,
                    generation_config=config,
                    prefix_allowed_tokens_fn=_of_row(given.prefix_allowed_tokens_fn, row),
                    generator=None if generators is None else generators[row],
                ),
            )
            for row, (own, start, config) in enumerate(zip(ids, starts, configs, strict=True))
        ]
        _finish(model, sequences)
        longest = max(len(sequence.new) for sequence in sequences)
        pads = [
            plan.pad_token(plan.configured(model.generation_config, c, given.options))
            for c in configs
        ]
        new = [
            sequence.new + [pad] * (longest - len(sequence.new))
            for sequence, pad in zip(sequences, pads, strict=True)
        ]
        run = torch.tensor(new, device=ids.device, dtype=torch.long)
        return torch.cat((prompt.given, run), dim=1)

    agreement = Agreement.of(model.world)
    if agreement is None:
        return run()
    if not agreement.decides:
        follow(model)

    def lead() -> Tensor:
        with leading(model):
            return run()

    return agreement.decided(lead, prompt.ids.device)


def _finish(model: Served, sequences: Sequence[Row]) -> None:
    """Run all sequences to their ends, in shared steps."""
    engine = Engine(
        model, len(sequences), max(one.prompt_length + one.max_new_tokens for one in sequences)
    )
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
