"""PEFT on our models: what an adapter does there it does here, trained, saved and merged."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quintet
from conformance.families import FAMILIES, Family, each
from quintet.interop import as_transformers
from support import relative_error as relative

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

# What PEFT says of tied weights, and Transformers to PEFT.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 5]])
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = {
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2-moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek-v2": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "deepseek-v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    # There each use of a shared block has an adapter of its own, here the block has one.
    "zamba2": ["in_proj", "out_proj"],
}
MLP = {
    "qwen2": ["gate_proj", "up_proj", "down_proj"],
    "qwen2-moe": ["shared_expert.gate_proj", "shared_expert.down_proj", "shared_expert_gate"],
    "deepseek-v2": [f"shared_experts.{part}_proj" for part in ("gate", "up", "down")],
    "deepseek-v3": [f"shared_experts.{part}_proj" for part in ("gate", "up", "down")],
    "zamba2": ["in_proj"],
}


def lora(targets: list[str] | str, **options: Any) -> Any:
    return peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False, **options
    )


Kind = Callable[[str], Any]
KINDS: dict[str, Kind] = {
    "attention": lambda name: lora(ATTENTION[name]),
    "mlp": lambda name: lora(MLP[name]),
    "experts": lambda name: lora([], target_parameters=EXPERTS),
    "embeddings": lambda name: lora(["embed_tokens"]),
    "head": lambda name: lora(["lm_head"]),
    "dora": lambda name: lora(ATTENTION[name], use_dora=True),
    "some-tokens": lambda name: lora(ATTENTION[name], trainable_token_indices=[5, 6]),
    "saved-head": lambda name: lora(ATTENTION[name], modules_to_save=["lm_head"]),
    "ia3": lambda name: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=ATTENTION[name],
        feedforward_modules=[],
        init_ia3_weights=False,
    ),
}
SPREADS = ("embeddings", "head")  # A merge changes a tied weight for both of its uses.


def twins(family: Family, tied: bool = True) -> tuple[Any, Any]:
    torch.manual_seed(3)
    ours, theirs = family.twins("ForCausalLM", {"tie_word_embeddings": tied}, "sdpa")
    return as_transformers(ours).eval(), theirs.eval()


def adapted(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    made = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


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
