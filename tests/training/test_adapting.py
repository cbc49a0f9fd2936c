"""The `[adapter]` table: what it asks for is put on a model, learns alone, and is read by PEFT."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quintet
from comparisons import calmed
from conformance.families import FAMILIES, Family, each
from pefts import IDS, QUIET, logits, peft, relative, twins
from quintet.errors import ModelNotFoundError
from quintet.quantization import Quantized
from quintet.training.adapting import AdapterSettings, Trained, put_adapter
from quintet.training.settings import SettingError, build, key_of

pytestmark = QUIET
ROUTED = ("qwen2-moe", "deepseek-v2", "deepseek-v3")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "stable": {"use_rslora": True, "lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "experts": {"experts": True, "modules_to_save": ["norm"]},
}
CASES = [
    pytest.param(family, kind, id=f"{family.name}-{kind}")
    for family in FAMILIES
    for kind in KINDS
    if kind != "experts" or family.name in ROUTED
]


def taught(model: Any, steps: int = 3, seed: int = 0) -> list[float]:
    """Train what is to be trained, and return the losses."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def readable_by_peft(family: Family) -> dict[str, Any]:
    """PEFT takes maps that are called as those of DeepSeek's experts for these."""
    deepseek = family.name.startswith("deepseek")
    return {"exclude_modules": ["gate_proj", "up_proj", "down_proj"]} if deepseek else {}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_the_table_asks_for_is_trained_alone(
    family: Family, kind: str, tmp_path: Path
) -> None:
    ours, theirs = twins(family)
    calmed(ours, theirs)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    settings = build(
        AdapterSettings, {"r": 4, "lora_alpha": 8, **KINDS[kind], **readable_by_peft(family)}
    )
    put_adapter(ours, settings)
    count = Trained.count(ours)
    assert 0 < count.parameters < count.total
    losses = taught(ours)
    assert losses[-1] < losses[0]
    after = ours.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert all(".adapters." in name for name in trained)
    assert not any(name.startswith("lm_head") or ".mlp.gate." in name for name in trained)

    made = logits(ours)
    ours.save_pretrained(tmp_path)
    there = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert relative(made, logits(there)) < 1e-6
    # Of a shared block, each layer has an adapter of its own, which one weight cannot hold.
    if family.name != "zamba2":
        ours.merge_adapter()
        assert relative(logits(ours), made) < 1e-6
        ours.unmerge_adapter()
        assert torch.equal(logits(ours), made)


@each
def test_training_goes_on_from_an_adapter(family: Family, tmp_path: Path) -> None:
    """As if it had never stopped, where the optimiser keeps nothing."""
    options = {"lora_dropout": 0.2, "init_lora_weights": "gaussian"}
    whole, first, second = (twins(family)[0] for _ in range(3))
    for model in (whole, first):
        torch.manual_seed(0)
        put_adapter(model, build(AdapterSettings, options))
    told = taught(whole, 2) + taught(whole, 2, seed=1)
    found = taught(first, 2)
    first.save_pretrained(tmp_path / "first")
    put_adapter(second, AdapterSettings(from_=str(tmp_path / "first")))
    found += taught(second, 2, seed=1)
    assert found == told
    assert torch.equal(logits(second), logits(whole))


@each
def test_dropout_is_drawn_alike_where_layers_are_recomputed(family: Family) -> None:
    grads: list[list[Tensor | None]] = []
    for reentrant in (None, False, True):
        model = family.model_of().train()
        torch.manual_seed(0)
        put_adapter(model, AdapterSettings(lora_dropout=0.3, init_lora_weights=False))
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(1)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, *others in zip(*grads, strict=True):
        for other in others:
            assert (one is None) == (other is None)
            assert one is None or other is None or relative(other, one) < 1e-4


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
@each
def test_a_step_over_fewer_bits_keeps_no_decoded_matrix(
    family: Family, quantize: str, tmp_path: Path
) -> None:
    family.model_of(tie_word_embeddings=False).save_pretrained(tmp_path)
    model = family.cls("ForCausalLM").from_pretrained(tmp_path, quantize=quantize)
    held = {
        shape
        for module in model.modules()
        if isinstance(module, Quantized)
        for shape, _ in module.matrices.values()
    }
    assert held
    put_adapter(model, AdapterSettings(r=3, experts=family.name in ROUTED))
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    shapes = {tuple(t.shape) for t in kept if t.data_ptr() not in own}
    assert not shapes & {*held, *(shape[::-1] for shape in held)}
    loss.backward()
    losses = taught(model)
    assert losses[-1] < losses[0]


def test_a_key_of_every_field_of_an_adapter() -> None:
    there = {field.name for field in fields(quintet.LoraConfig)}
    ours = {key_of(field) for field in fields(AdapterSettings)}
    # What says nothing of training: matrices of other libraries, and what is filled in.
    fixed = {"fan_in_fan_out", "ensure_weight_tying", "task_type", "base_model_name_or_path"}
    assert ours - {"from", "experts"} == there - fixed


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"r": 0}, "r = 0: has to be an integer of at least 1"),
        ({"rank": 8}, "rank: there is no such key"),
        ({"target_modules": "(a+)+b"}, "target_modules = .*plain regular expression"),
        ({"experts": True, "use_dora": True}, "use_dora = true: cannot be with experts"),
        (
            {"target_parameters": ["gate.weight"], "lora_dropout": 0.1},
            "lora_dropout = 0.1: cannot be with target_parameters",
        ),
        ({"from": "there", "r": 4}, "r = 4: contradicts from"),
    ],
    ids=str,
)
def test_what_the_table_cannot_say(table: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingError, match=told):
        build(AdapterSettings, table)


def test_what_does_not_fit_the_model(tmp_path: Path) -> None:
    model = FAMILIES[0].model_of()
    with pytest.raises(SettingError, match=r"adapter: target_modules=\['nothing'\]"):
        put_adapter(model, AdapterSettings(target_modules=("nothing",)))
    with pytest.raises(ModelNotFoundError, match="is empty"):
        put_adapter(model, AdapterSettings(from_=str(tmp_path)))
    put_adapter(model, AdapterSettings())
    with pytest.raises(
        SettingError, match=r"comes with the adapter 'default'; .* merge_and_unload"
    ):
        put_adapter(model, AdapterSettings())


def test_what_is_trained_is_told_in_a_line() -> None:
    model = FAMILIES[0].model_of()
    put_adapter(model, AdapterSettings(r=2, target_modules=("q_proj",)))
    count = Trained.count(model)
    assert count.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.learning == 12 * count.parameters
    assert "trains 768 of" in str(count)
