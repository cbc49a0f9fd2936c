"""PEFT on our models: what an adapter does there it does here, trained, saved and merged."""

from pathlib import Path

import pytest
import torch

import quintet
from conformance.families import FAMILIES, Family, each
from pefts import ATTENTION, IDS, KINDS, QUIET, adapted, logits, lora, peft, relative, twins

pytestmark = QUIET
SPREADS = ("embeddings", "head")  # A merge changes a tied weight for both of its uses.

CASES = [
    pytest.param(family, kind, id=f"{family.name}-{kind}")
    for family in FAMILIES
    for kind in KINDS
    if kind != "experts" or family.name not in ("qwen2", "zamba2")
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_an_adapter_of_transformers_does_the_same_here(
    family: Family, kind: str, tmp_path: Path
) -> None:
    ours, theirs = twins(family)
    plain = logits(ours)
    there = adapted(theirs, KINDS[kind](family.name))
    here = peft.get_peft_model(ours, KINDS[kind](family.name)).eval()
    state = peft.get_peft_model_state_dict(there)
    peft.set_peft_model_state_dict(here, state)
    assert set(peft.get_peft_model_state_dict(here)) == set(state)
    made = logits(here)
    assert relative(made, logits(there)) < 1e-5
    assert relative(made, plain) > 1e-3

    here.train()
    here(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in here.parameters() if p.requires_grad)
    here.eval()

    here.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(twins(family)[0], tmp_path).eval()
    assert relative(logits(again), made) < 1e-5
    assert torch.equal(
        again.generate(input_ids=IDS, max_new_tokens=3),
        here.generate(input_ids=IDS, max_new_tokens=3),
    )
    merged = here.merge_and_unload()
    assert relative(logits(merged), logits(there.merge_and_unload())) < 1e-5
    assert kind in SPREADS or relative(logits(merged), made) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES[:4], ids=str)
def test_all_linear_takes_what_it_takes_there(family: Family, tied: bool, tmp_path: Path) -> None:
    ours, theirs = twins(family, tied)
    there, here = (adapted(model, lora("all-linear")) for model in (theirs, ours))
    state = peft.get_peft_model_state_dict(there)
    assert set(peft.get_peft_model_state_dict(here)) == set(state)
    peft.set_peft_model_state_dict(here, state)
    made = logits(here)
    assert relative(made, logits(there)) < 1e-5
    merged = here.merge_and_unload()
    assert relative(logits(merged), made) < 1e-5
    merged.save_pretrained(tmp_path)
    assert relative(logits(family.cls("ForCausalLM").from_pretrained(tmp_path)), made) < 1e-5


def test_all_linear_leaves_zamba2s_head() -> None:
    made = peft.get_peft_model(twins(FAMILIES[4])[0], lora("all-linear"))
    assert not any("lm_head" in name for name in peft.get_peft_model_state_dict(made))


@each
@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
        ("Model", "FEATURE_EXTRACTION"),
    ],
)
def test_other_tasks(family: Family, head: str, task: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        task_type=task, target_modules=ATTENTION[family.name], init_lora_weights=False
    )
    mask = torch.ones_like(IDS)
    made = peft.get_peft_model(family.model_of(head), config).eval()
    made.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(family.model_of(head), tmp_path).eval()
    with torch.no_grad():
        first, second = (m(input_ids=IDS, attention_mask=mask).to_tuple()[0] for m in (made, again))
        assert relative(first, second) < 1e-5
        plain = family.model_of(head)(input_ids=IDS, attention_mask=mask).to_tuple()[0]
        assert relative(first, plain) > 1e-4


def test_a_router_is_no_linear_map() -> None:
    model = FAMILIES[1].model_of()
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert not any(name.endswith("mlp.gate") for name in linear)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert quintet.Qwen2MoeForCausalLM(model.config).model.layers[0].mlp.gate.weight.std() > 0
