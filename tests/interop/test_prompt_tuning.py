"""What PEFT puts in front of a prompt: vectors of its own, or keys and values in a cache."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conformance.families import FAMILIES, Family, each
from quintet.errors import InputError
from quintet.interop import as_transformers
from support import relative_error as relative

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

# What Transformers says to PEFT, and PEFT to Transformers' `generate`.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
IDS = torch.tensor([[0, 6, 7, 8, 9], [11, 12, 13, 14, 5]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
KINDS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16
    ),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
CASES = [
    pytest.param(family, kind, id=f"{family.name}-{kind}")
    for family in FAMILIES
    for kind in KINDS
    # There, too, a prefix fits attention with keys of one size alone.
    if kind != "prefix" or family.name in ("qwen2", "qwen2-moe")
]


def twins(family: Family) -> tuple[Any, Any]:
    torch.manual_seed(3)
    ours, theirs = family.twins("ForCausalLM", {"tie_word_embeddings": True}, "sdpa")
    return as_transformers(ours).eval(), theirs.eval()


def tuned(model: Any, kind: str) -> Any:
    torch.manual_seed(0)
    made = peft.get_peft_model(model, copy.deepcopy(KINDS[kind])).eval()
    with torch.no_grad():
        for parameter in made.prompt_encoder.parameters():
            parameter.normal_()
    return made


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_it_is_as_in_transformers(family: Family, kind: str, tmp_path: Path) -> None:
    here, there = (tuned(model, kind) for model in twins(family))
    inputs = {"input_ids": IDS[1:], "attention_mask": MASK[1:]}
    with torch.no_grad():
        made = here(**inputs).logits
        assert relative(made, there(**inputs).logits) < 1e-5
        assert relative(made[:, -5:], here.base_model(**inputs).logits) > 1e-3
    ours, theirs = (
        model.generate(**inputs, max_new_tokens=5, do_sample=False) for model in (here, there)
    )
    assert torch.equal(ours, theirs)

    here.train()
    here(**inputs, labels=IDS[1:]).loss.backward()
    assert all(p.grad is not None for p in here.parameters() if p.requires_grad)
    here.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(twins(family)[0], tmp_path).eval()
    assert torch.equal(again.generate(**inputs, max_new_tokens=5, do_sample=False), ours)
    # The model goes on without what was in front of it.
    plain, _ = twins(family)
    assert torch.equal(here.get_base_model().generate(IDS[1:]), plain.generate(IDS[1:]))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_padded_row_is_what_it_is_alone(family: Family, kind: str) -> None:
    here = tuned(twins(family)[0], kind)
    options = {"max_new_tokens": 4, "do_sample": False}
    both = here.generate(input_ids=IDS, attention_mask=MASK, **options)
    alone = here.generate(input_ids=IDS[:1, 1:], attention_mask=MASK[:1, 1:], **options)
    # Alone it ends with its end token.
    made = alone[0, 4:]
    assert torch.equal(both[0, 5 : 5 + len(made)], made)
    beams = here.generate(input_ids=IDS, attention_mask=MASK, num_beams=2, **options)
    assert beams.shape == both.shape


def test_what_does_not_go_together_is_refused() -> None:
    here = tuned(twins(FAMILIES[0])[0], "prompt")
    for option in (
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
    ):
        with pytest.raises(InputError, match="prepare_inputs_for_generation"):
            here.generate(input_ids=IDS[1:], max_new_tokens=2, **option)


@pytest.mark.parametrize("family", FAMILIES[2:], ids=str)
def test_a_prefix_that_does_not_fit_is_refused(family: Family) -> None:
    with pytest.raises(InputError, match="such caches cannot be exchanged"):
        tuned(twins(family)[0], "prefix")(input_ids=IDS)


@pytest.mark.parametrize("family", FAMILIES[:2], ids=str)
@torch.no_grad()
def test_a_cache_of_transformers_is_gone_on_from(family: Family) -> None:
    ours, theirs = twins(family)
    past = theirs(IDS[:, :3], attention_mask=MASK[:, :3], use_cache=True).past_key_values
    # Positions are counted from the first token here, from the first column there.
    at = (MASK.cumsum(1) - 1).clamp(min=0)
    past = theirs(
        IDS[:, :3], attention_mask=MASK[:, :3], position_ids=at[:, :3], use_cache=True
    ).past_key_values
    made = ours(IDS[:, 3:], attention_mask=MASK, past_key_values=past)
    whole = ours(IDS, attention_mask=MASK)
    assert relative(made.logits, whole.logits[:, 3:]) < 1e-5
    assert made.past_key_values.get_seq_length() == whole.past_key_values.get_seq_length()
    fresh = ours(IDS, attention_mask=MASK, past_key_values=transformers.DynamicCache())
    assert torch.equal(fresh.logits, whole.logits)


@pytest.mark.parametrize("family", FAMILIES[:2], ids=str)
@torch.no_grad()
def test_generating_goes_on_from_a_cache_of_transformers(family: Family) -> None:
    ours, theirs = twins(family)
    wanted = ours.generate(IDS, attention_mask=MASK, max_new_tokens=3)
    at = (MASK.cumsum(1) - 1).clamp(min=0)
    for held in (0, 3):
        past = transformers.DynamicCache()
        if held:
            masked = {"attention_mask": MASK[:, :held], "position_ids": at[:, :held]}
            theirs(IDS[:, :held], past_key_values=past, use_cache=True, **masked)
        made = ours.generate(IDS, attention_mask=MASK, past_key_values=past, max_new_tokens=3)
        assert torch.equal(made, wanted)


@each
def test_a_loop_prepared_as_usual_is_the_usual_one(family: Family) -> None:
    model = family.model_of()
    wanted = model.generate(IDS, attention_mask=MASK, max_new_tokens=4)
    seen = []

    def prepare(ids: torch.Tensor, **others: Any) -> dict[str, Any]:
        seen.append(ids.shape[1])
        return type(model).prepare_inputs_for_generation(model, ids, **others)

    model.prepare_inputs_for_generation = prepare
    for use_cache in (True, False):
        made = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, use_cache=use_cache)
        assert torch.equal(made, wanted)
    assert seen == [5, 6, 7, 8] * 2
