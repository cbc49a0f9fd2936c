"""A list of configs: each row becomes what it becomes alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import Family, each
from generation.sequences import ENDS, prompt_of
from quintet import GenerationConfig
from quintet.errors import InputError

OPTIONS: list[dict[str, Any]] = [
    {"max_new_tokens": 4},
    {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "top_k": 12},
    {"max_new_tokens": 6, "do_sample": True, "top_p": 0.8, "repetition_penalty": 1.3},
    {"max_new_tokens": 9, "prompt_lookup_num_tokens": 3, "pad_token_id": 1},
    {"max_new_tokens": 7, "no_repeat_ngram_size": 2, "do_sample": True, "top_k": 5},
]
LENGTHS = [3, 11, 1, 6, 11]


def batch(side: str) -> tuple[Tensor, Tensor]:
    """Return ids and mask of prompts that are not equally long."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        own = slice(-length, None) if side == "left" else slice(length)
        ids[row, own], mask[row, own] = prompt_of(length, row)[0], 1
    return ids, mask


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(len(LENGTHS))]


@each
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_is_generated_by_its_own(family: Family, side: str) -> None:
    model = family.model_of()
    ids, mask = batch(side)
    configs = [GenerationConfig(**{**ENDS, **own}) for own in OPTIONS]
    out = model.generate(ids, configs, attention_mask=mask, generator=seeded())
    assert torch.equal(out[:, : ids.shape[1]], ids)
    for row, (config, generator) in enumerate(zip(configs, seeded(), strict=True)):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = model.generate(prompt, config, generator=generator)[0, prompt.shape[1] :]
        behind = out[row, ids.shape[1] :]
        assert behind[: len(alone)].tolist() == alone.tolist()
        assert set(behind[len(alone) :].tolist()) <= {config.pad_token_id}


@each
def test_what_a_call_says_goes_before_every_config(family: Family) -> None:
    model = family.model_of()
    configs = [GenerationConfig(max_new_tokens=n, eos_token_id=-1, pad_token_id=0) for n in (2, 5)]
    ids = torch.cat((prompt_of(4, 1), prompt_of(4, 2)))
    assert model.generate(ids, configs).shape == (2, 9)
    assert model.generate(ids, configs, max_new_tokens=3).shape == (2, 7)

    def allowed(row: int, _: Tensor) -> list[int]:
        return [20 + row]

    out = model.generate(ids, configs, prefix_allowed_tokens_fn=allowed)
    assert out[:, 4:].tolist() == [[20, 20, 0, 0, 0], [21] * 5]


@each
def test_what_rows_cannot_have_of_their_own_is_named(family: Family) -> None:
    model, ids = family.model_of(), torch.cat((prompt_of(4, 1), prompt_of(4, 2)))
    two = [GenerationConfig(max_new_tokens=2)] * 2
    with pytest.raises(InputError, match="list of 3 and the prompt has 2 rows"):
        model.generate(ids, [*two, two[0]])
    with pytest.raises(InputError, match="num_beams=3 is no option of one sequence"):
        model.generate(ids, two, num_beams=3)
    with pytest.raises(InputError, match="past_key_values goes with one generation_config"):
        model.generate(ids, two, past_key_values=model.new_cache())
    with pytest.raises(InputError, match=r"generation_config is a .*str"):
        model.generate(ids, ["greedy", "greedy"])

    def fails(ids: Tensor, scores: Tensor) -> Tensor:
        raise LookupError("of the caller")

    with pytest.raises(LookupError, match="of the caller"):
        model.generate(ids, two, logits_processor=[fails])
