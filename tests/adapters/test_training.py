"""New adapters: what they are put on, that they learn, and that PEFT reads what is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import quintet
from conformance.families import FAMILIES, Family, each
from pefts import ATTENTION, IDS, QUIET, logits, lora, peft, relative, twins
from quintet.checkpoint import Checkpoint
from quintet.errors import ConfigError, InputError, UnsupportedModelError

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape"),
]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
Options = Mapping[str, Any]
NEW: dict[str, Options] = {
    "plain": {},
    # What is called as the maps of experts are, PEFT takes for those of experts, too.
    "all-linear": {
        "target_modules": "all-linear",
        "exclude_modules": ["gate_proj", "up_proj", "down_proj", "gate"],
    },
    "by-pattern": {"target_modules": r".*\.layers\.[01]\..*(o|out)_proj", "r": 2},
    "one-layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "rank-stable": {"use_rslora": True, "rank_pattern": {"o_proj": 2}, "lora_bias": True},
    "dora": {"use_dora": True, "init_lora_weights": "gaussian"},
    "biases": {"bias": "all"},
    "own-biases": {"bias": "lora_only"},
    "whole": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": False},
    "tokens": {"trainable_token_indices": [5, 6]},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "router": {"target_parameters": ["mlp.gate.weight", *EXPERTS[:1]]},
}
CASES = [
    pytest.param(family, kind, id=f"{family.name}-{kind}")
    for family in FAMILIES
    for kind in NEW
    if (kind in ("experts", "router")) <= (family.name not in ("qwen2", "zamba2"))
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_new_adapter_learns_and_peft_reads_it(family: Family, kind: str, tmp_path: Path) -> None:
    ours, theirs = twins(family)
    plain = logits(ours)
    given = {"r": 4, "target_modules": ATTENTION[family.name], **NEW[kind]}
    ours.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM", **given))
    assert relative(logits(ours), plain) < 1e-6
    ours.train()
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert trained
    steps = torch.optim.SGD(trained, lr=0.3)
    losses = []
    for _ in range(3):
        loss = ours(input_ids=IDS, labels=IDS).loss
        loss.backward()
        # Of a shared block's own adapters, each use has one.
        idle = family.name == "zamba2" and kind == "all-linear"
        assert idle or all(p.grad is not None for p in trained)
        assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)
        steps.step()
        steps.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    made = logits(ours.eval())
    ours.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    there = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert relative(made, logits(there)) < 1e-5
    names = set(Checkpoint.open(tmp_path, stem="adapter_model").tensors)
    assert names == set(peft.get_peft_model_state_dict(there, save_embedding_layers=False))
    again, _ = twins(family)
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), made)


@each
def test_it_learns_as_in_peft(family: Family) -> None:
    ours, theirs = twins(family)
    config = lora(ATTENTION[family.name], use_dora=True)
    there = peft.get_peft_model(theirs, config)
    ours.load_adapter(
        peft_config=config,
        adapter_state_dict=peft.get_peft_model_state_dict(there),
        is_trainable=True,
    )
    for model in (ours, there):
        # In training, DeepSeek-V2 adds a loss of its experts' balance here.
        model.eval()
        model(input_ids=IDS, labels=IDS).loss.backward()
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in there.named_parameters() if p.grad is not None}
    assert len(found) == len(wanted)
    for name, theirs_grad in wanted.items():
        path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        leaf = "magnitude" if "magnitude" in rest else f"lora_{rest[0]}"
        ours_grad = found[f"{path}.adapters.default.all.added.weight.{leaf}"]
        assert relative(ours_grad, theirs_grad) < 1e-4


def test_layers_are_recomputed_with_adapters() -> None:
    grads = []
    for recomputes in (False, True):
        model = FAMILIES[4].model_of()
        torch.manual_seed(0)
        model.add_adapter(quintet.LoraConfig(target_modules=["q_proj", "in_proj"]))
        model.train()
        if recomputes:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"target_modules": ["nothing"]}, InputError, "name nothing"),
        ({"target_modules": ["mlp"]}, InputError, "low rank"),
        ({}, InputError, "name nothing"),
        ({"target_modules": ["o_proj"], "r": 0}, ConfigError, "r=0"),
        ({"target_modules": ["o_proj"], "bias": "some"}, ConfigError, "bias"),
        ({"target_modules": "(a+)+b"}, ConfigError, "plain regular expression"),
        ({"trainable_token_indices": [10**6]}, InputError, "ids"),
        ({"target_parameters": ["norm.weight"]}, InputError, "shape"),
        ({"target_modules": ["o_proj"], "fan_in_fan_out": True}, UnsupportedModelError, "fan_in"),
        (
            {"target_modules": ["o_proj"], "init_lora_weights": "pissa"},
            UnsupportedModelError,
            "piss",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: Options, error: Any, match: str) -> None:
    model = FAMILIES[0].model_of()
    with pytest.raises(error, match=match):
        model.add_adapter({"peft_type": "LORA", **options})
    assert model.adapters is None or not model.adapters.configs
    assert not any("adapters" in name for name, _ in model.named_modules())
