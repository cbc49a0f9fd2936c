"""Arguments of `generate()` that come from elsewhere: positions, labels, foreign configs."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from conformance.families import FAMILIES, Family, each
from quintet import GenerationConfig
from quintet.errors import InputError

BASE: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def prompts(B: int = 2, T: int = 6) -> dict[str, Tensor]:
    torch.manual_seed(3)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[-1, :2] = 0
    return {"input_ids": torch.randint(2, 90, (B, T)) * mask, "attention_mask": mask}


@each
def test_positions_go_on_from_those_given(family: Family) -> None:
    """Checked by hand: every next token by a forward over the whole text with its positions."""
    model = family.model_of()
    given, positions = prompts(), torch.tensor([[3, 5, 6, 9, 12, 13], [0, 0, 4, 5, 8, 20]])
    made = model.generate(**given, position_ids=positions, **BASE)
    for row, gap in ((0, 0), (1, 2)):
        ids, places = given["input_ids"][row : row + 1, gap:], positions[row : row + 1, gap:]
        for _ in range(6):
            # With a mask, a gap between positions is no border between packed texts.
            mask = torch.ones_like(ids)
            logits = model(ids, mask, position_ids=places, use_cache=False).logits
            ids = torch.cat((ids, logits[:, -1:].argmax(dim=-1)), dim=1)
            places = torch.cat((places, places[:, -1:] + 1), dim=1)
        assert made[row, gap:].tolist() == ids[0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 2},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_positions_in_every_way_to_generate(options: dict[str, Any]) -> None:
    """The positions there would be anyhow, and the same ones further on, change no text."""
    model = FAMILIES[0].model_of()
    given = prompts()
    usual = (given["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    plain = model.generate(**given, **BASE, **options)
    for shift in (0, 7):
        made = model.generate(**given, position_ids=usual + shift, **BASE, **options)
        assert torch.equal(*(x if isinstance(x, Tensor) else x.sequences for x in (made, plain)))


def test_positions_are_those_of_transformers() -> None:
    ours, theirs = FAMILIES[0].twins("ForCausalLM", {}, "eager")
    given, positions = prompts(), torch.tensor([[3, 5, 6, 9, 12, 13], [0, 0, 4, 5, 8, 20]])
    options = {**given, "position_ids": positions, **BASE}
    assert torch.equal(ours.generate(**options), theirs.generate(**options))


@each
def test_without_a_prompt_a_text_begins_with_bos(family: Family) -> None:
    model = family.model_of()
    options = {**BASE, "bos_token_id": 7}
    made = model.generate(**options)
    assert torch.equal(made, model.generate(torch.tensor([[7]]), **BASE))
    with pytest.raises(InputError, match=r"there is no prompt; .* bos_token_id"):
        model.generate(**BASE, bos_token_id=None)


def test_what_trainers_pass_changes_no_text() -> None:
    model = FAMILIES[0].model_of()
    given = prompts()
    plain = model.generate(**given, **BASE)
    for more in (
        {"labels": given["input_ids"]},
        {"logits_to_keep": 0},
        {"logits_to_keep": 3},
        {"synced_gpus": True},
    ):
        assert torch.equal(model.generate(**given, **BASE, **more), plain)


def test_a_config_of_transformers_is_read() -> None:
    model = FAMILIES[0].model_of()
    values = {
        **BASE,
        "do_sample": True,
        "top_k": 7,
        "repetition_penalty": 1.3,
        "watermarking_config": {"bias": 3.0},
        "exponential_decay_length_penalty": None,
        "sequence_bias": {(4,): 2.0},
    }
    seed = torch.Generator().manual_seed(1)
    own = model.generate(**prompts(), generation_config=GenerationConfig(**values), generator=seed)
    seed = torch.Generator().manual_seed(1)
    theirs = transformers.GenerationConfig(**values)
    read = model.generate(**prompts(), generation_config=theirs, generator=seed)
    assert torch.equal(own, read)
    with pytest.warns(UserWarning, match="generation_config sets penalty_alpha=0.6, which"):
        model.generate(
            **prompts(),
            generation_config=transformers.GenerationConfig(penalty_alpha=0.6, max_new_tokens=2),
        )
    # What it does not set is as in the model's own.
    model.generation_config = GenerationConfig(eos_token_id=4, max_new_tokens=3)
    made = model.generate(**prompts(), generation_config=transformers.GenerationConfig())
    assert made.shape[1] <= 9
    for wrong in (3, "greedy", transformers.GenerationConfig):
        with pytest.raises(InputError, match="it has to be quintet's GenerationConfig, or that"):
            model.generate(**prompts(), generation_config=wrong)


@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_states_of_a_padded_row_with_drafts(way: str) -> None:
    model = FAMILIES[0].model_of()
    given = {name: x[1:] for name, x in prompts().items()}
    drafts: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if way == "assistant":
        drafts = {"assistant_model": copy.deepcopy(model)}
    options = {**BASE, "return_dict_in_generate": True, "output_hidden_states": True}
    plain = model.generate(**given, **options)
    made = model.generate(**given, **options, **drafts)
    assert torch.equal(made.sequences, plain.sequences)
    assert len(made.hidden_states) == len(plain.hidden_states) == 6
    for ours, usual in zip(made.hidden_states, plain.hidden_states, strict=True):
        for one, other in zip(ours, usual, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
