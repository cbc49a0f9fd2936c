"""Adapters in PEFT's files do here what they do there, on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family
from pefts import ATTENTION, IDS, KINDS, QUIET, adapted, logits, lora, peft, relative, twins
from quintet.errors import UnsupportedModelError

pytestmark = [
    *QUIET,
    # PEFT on biases of B.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
]
OURS: dict[str, Any] = {
    **{kind: make for kind, make in KINDS.items() if kind != "ia3"},
    "options": lambda name: lora(
        ATTENTION[name],
        use_rslora=True,
        lora_bias=True,
        bias="all",
        rank_pattern={"o_proj": 3, r".*\.in_proj": 2},
        alpha_pattern={"o_proj": 5, r"^model\.layers\.1\..*(k|in)_proj": 3},
    ),
    "everything": lambda name: lora("all-linear", modules_to_save=["norm"]),
    "router": lambda name: lora([], target_parameters=["mlp.gate.weight"]),
    # There each use of the block has a matrix of its own to adapt; here they share one.
    "shared-block": lambda name: lora(["q_proj", "v_proj", "gate_up_proj", "down_proj"]),
}
EXPERTS = ("experts", "router")
CASES = [
    pytest.param(family, kind, id=f"{family.name}-{kind}")
    for family in FAMILIES
    for kind in OURS
    if (kind in EXPERTS) <= (family.name not in ("qwen2", "zamba2"))
    if (kind == "shared-block") <= (family.name == "zamba2")
]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_peft_wrote_does_the_same_here(family: Family, kind: str, tmp_path: Path) -> None:
    ours, theirs = twins(family)
    plain = logits(ours)
    there = adapted(theirs, OURS[kind](family.name))
    there.save_pretrained(tmp_path)
    ours.load_adapter(tmp_path)
    made = logits(ours)
    assert relative(made, logits(there)) < 1e-5
    assert relative(made, plain) > 1e-3
    there.generation_config.pad_token_id = ours.generation_config.pad_token_id = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        ours.generate(input_ids=IDS, **options),
        there.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options),
    )
    ours.disable_adapters()
    assert torch.equal(logits(ours), plain)
    assert not any("forward" in vars(module) for module in ours.modules())
    ours.enable_adapters()
    assert torch.equal(logits(ours), made)
    ours.delete_adapter("default")
    assert torch.equal(logits(ours), plain)
    assert not any(".adapters." in name for name in ours.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"o_proj": 5}},
        {"use_dora": True},
    ],
    ids=("plain", "rslora", "dora"),
)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_began_as_a_part_of_the_model_is_one_of_the_original(
    start: str, options: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = twins(FAMILIES[0])
    plain = logits(ours)
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=start, **options
    )
    there = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in there.named_parameters():
            if "lora_A" in name:
                torch.manual_seed(len(name))
                parameter += 0.3 * torch.randn_like(parameter)
    there.save_pretrained(tmp_path / "theirs")
    ours.load_adapter(tmp_path / "theirs")
    found = logits(ours)
    assert relative(found, logits(there)) < 1e-5
    assert relative(found, plain) > 1e-3
    ours.save_pretrained(tmp_path / "ours")
    ours.load_adapter(tmp_path / "ours", "again")
    assert relative(logits(ours), found) < 1e-6
    _, original = twins(FAMILIES[0])
    again = peft.PeftModel.from_pretrained(original, tmp_path / "ours").eval()
    assert relative(logits(again), found) < 1e-5


def test_a_part_of_anything_but_maps_is_refused(tmp_path: Path) -> None:
    ours, _ = twins(FAMILIES[0])
    V, C = ours.config.vocab_size, ours.config.hidden_size
    at = "base_model.model.model.embed_tokens.lora_embedding_"
    state = {f"{at}A": torch.ones(2, V), f"{at}B": torch.ones(C, 2)}
    config = {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"}
    with pytest.raises(UnsupportedModelError, match="embed_tokens', which is no linear map"):
        ours.load_adapter(peft_config=config, adapter_state_dict=state)
    assert ours.adapters is None
