"""Which parameters are moved by whom."""

import math
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, HEADS, Family, each
from quintet import LoraConfig
from quintet.errors import ConfigError
from quintet.training.optimizers import GroupSettings, OptimizerSettings, build_optimizers
from quintet.training.optimizers.groups import Group, grouped
from quintet.training.settings import SettingError, build

MUON = OptimizerSettings(kind="muon")
TIED = {"qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3"}


def names(groups: list[Group], kind: str | None = None) -> list[str]:
    return [m.name for g in groups if kind in (None, g.kind) for m in g.members]


def group_of(groups: list[Group], name: str) -> Group:
    (group,) = [group for group in groups if name in [m.name for m in group.members]]
    return group


@pytest.fixture(scope="module")
def v3() -> Any:
    """A V3 with a prediction layer."""
    (family,) = [f for f in FAMILIES if f.name == "deepseek-v3"]
    return family.model_of(num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def zamba2() -> Any:
    (family,) = [f for f in FAMILIES if f.name == "zamba2"]
    return family.model_of()


@each
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(family: Family, kind: Any) -> None:
    for head in HEADS:
        model = family.model_of(head)
        found = names(grouped(model, OptimizerSettings(kind=kind)))
        assert sorted(found) == sorted(name for name, _ in model.named_parameters())


@each
def test_muon_has_the_matrices_of_layers_and_nothing_else(family: Family) -> None:
    model = family.model_of()
    groups = grouped(model, MUON)
    for name in names(groups, "muon"):
        assert ".layers." in name
        assert model.get_parameter(name).ndim > 1
    for name in names(groups, "adamw"):
        matrix = ".layers." in name and model.get_parameter(name).ndim > 1
        assert not matrix or any(word in name for word in ("gate.weight", "conv1d", "expert_gate"))


@each
def test_an_adapter_is_trained_alone(family: Family) -> None:
    model = family.model_of()
    config = LoraConfig(r=2, target_modules="all-linear", bias="lora_only", modules_to_save=None)
    model.add_adapter(config)
    groups = grouped(model, MUON)
    assert sorted(names(groups)) == sorted(
        n for n, p in model.named_parameters() if p.requires_grad
    )
    assert all(".adapters." in name for name in names(groups))
    assert {group.kind for group in groups} == {"adamw"}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in TIED], ids=str)
def test_what_is_tied_is_moved_once(family: Family) -> None:
    groups = grouped(family.model_of(tie_word_embeddings=True), MUON)
    assert "lm_head.weight" not in names(groups)
    member = next(m for g in groups for m in g.members if m.name == "model.embed_tokens.weight")
    assert member.role == "embedding"


def test_the_parts_of_a_prediction_layer(v3: Any) -> None:
    groups = grouped(v3, MUON)
    roles = {m.name: m.role for g in groups for m in g.members}
    assert roles["model.layers.3.eh_proj.weight"] == "matrix"
    assert roles["model.layers.3.enorm.weight"] == "norm"
    # One matrix for both predictions, first met here.
    assert roles["model.layers.3.shared_head.head.weight"] == "head"


def test_stacks_are_matrices_each(v3: Any, zamba2: Any) -> None:
    experts = group_of(grouped(v3, MUON), "model.layers.1.mlp.experts.gate_up_proj")
    assert experts.matrices == 2
    assert group_of(grouped(v3, MUON), "model.layers.1.mlp.experts.down_proj").matrices == 1
    groups = grouped(zamba2, MUON)
    mlp = "model.layers.1.shared_transformer.feed_forward."
    assert group_of(groups, f"{mlp}gate_up_proj.weight").matrices == 2
    # The second factor adds to gate and up, the first is one matrix.
    assert group_of(groups, f"{mlp}gate_up_proj_adapter_list.0.0.weight").matrices == 1
    assert group_of(groups, f"{mlp}gate_up_proj_adapter_list.0.1.weight").matrices == 2


def test_heads_are_matrices_each(v3: Any) -> None:
    (family,) = [f for f in FAMILIES if f.name == "qwen2"]
    qwen2 = family.model_of()
    attention = "model.layers.0.self_attn."
    groups = grouped(qwen2, MUON)
    assert group_of(groups, f"{attention}q_proj.weight").matrices == 4
    assert group_of(groups, f"{attention}k_proj.weight").matrices == 2
    assert group_of(groups, f"{attention}v_proj.weight").matrices == 2
    # The heads are its columns.
    assert group_of(groups, f"{attention}o_proj.weight").matrices == 1
    groups = grouped(v3, MUON)
    assert group_of(groups, f"{attention}q_b_proj.weight").matrices == 4
    assert group_of(groups, f"{attention}kv_b_proj.weight").matrices == 4
    assert group_of(groups, f"{attention}kv_a_proj_with_mqa.weight").matrices == 1
    whole = grouped(v3, OptimizerSettings(kind="muon", by_head=False))
    assert group_of(whole, f"{attention}kv_b_proj.weight").matrices == 1


def test_what_does_not_decay(zamba2: Any) -> None:
    groups = grouped(zamba2, MUON)
    still = [m.name for g in groups if g.weight_decay == 0 for m in g.members]
    expected = ("norm.weight", "bias", "A_log", ".D")
    assert sorted(still) == sorted(n for n, _ in zamba2.named_parameters() if n.endswith(expected))
    also = OptimizerSettings(undecayed=("norm", "bias", "state", "embedding"))
    assert group_of(grouped(zamba2, also), "model.embed_tokens.weight").weight_decay == 0


def test_groups_of_ones_own(v3: Any) -> None:
    settings = OptimizerSettings(
        kind="muon",
        learning_rate=0.01,
        adamw_learning_rate=0.002,
        groups=(
            GroupSettings(match=("embedding",), weight_decay=0.0, learning_rate=0.5),
            GroupSettings(match=("*.self_attn.*_proj.weight",), kind="adamw"),
            GroupSettings(match=("*.layers.0.mlp.down_proj.weight",), matrices=2),
        ),
    )
    groups = grouped(v3, settings)
    embedding = group_of(groups, "model.embed_tokens.weight")
    assert (embedding.learning_rate, embedding.weight_decay) == (0.001, 0.0)
    attention = group_of(groups, "model.layers.0.self_attn.q_b_proj.weight")
    assert (attention.kind, attention.learning_rate) == ("adamw", 0.002)
    assert group_of(groups, "model.layers.0.mlp.down_proj.weight").matrices == 2
    assert group_of(groups, "model.layers.0.mlp.up_proj.weight").learning_rate == 0.01
    assert len({group.name for group in groups}) == len(groups)


def test_what_is_frozen_gets_no_gradient_and_does_not_move() -> None:
    (family,) = [f for f in FAMILIES if f.name == "qwen2"]
    model = family.model_of()
    frozen = GroupSettings(match=("embedding", "*.layers.0.*"), frozen=True)
    optimizers = build_optimizers(model, OptimizerSettings(groups=(frozen,)))
    ids = torch.arange(12)[None]
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        still = "embed_tokens" in name or ".layers.0." in name
        assert (p.grad is None) == still
    assert not any(".layers.0." in name for name in optimizers.tensors())


def test_the_groups_are_told_as_a_table(v3: Any) -> None:
    lines = build_optimizers(v3, MUON).table().splitlines()
    assert lines[0].split() == ["learning", "rate", "decay", "tensors", "numbers"]
    assert any(line.startswith("muon: matrix of 2 ") for line in lines)
    counted = sum(int(line.split()[-1].replace(",", "")) for line in lines[1:])
    assert counted == sum(p.numel() for p in v3.parameters())


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        (
            [{"match": ["*.embed_token.*"]}],
            "matches no parameter .* as 'model.embed_tokens.weight'",
        ),
        ([{"match": ["norm"], "kind": "muon"}], 'is no matrix.*kind = "adamw"'),
        ([{"match": ["matrix"], "kind": "muon", "matrices": 7}], "does not divide the 20 rows"),
        ([{"match": ["matrix"], "matrices": 2}], "is for Muon, and .* is moved by AdamW"),
        ([{"match": ["*"], "frozen": True}], "no parameter of the model is trained"),
    ],
)
def test_what_cannot_be_done_is_refused(groups: Any, told: str) -> None:
    (family,) = [f for f in FAMILIES if f.name == "deepseek-v3"]
    with pytest.raises(ConfigError, match=told):
        grouped(family.model_of(), build(OptimizerSettings, {"groups": groups}))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kind": "adam"}, 'kind = "adam": has to be one of "adamw", "muon"'),
        ({"learning_rate": -1}, "learning_rate = -1.0: has to be a finite number, 0 or more"),
        ({"weight_decay": math.nan}, "weight_decay = nan"),
        ({"betas": [0.9]}, "has to be a list of 2"),
        ({"betas": [0.9, 1]}, "has to be two numbers"),
        ({"max_norm": 0}, "inf does not clip"),
        ({"momentum": 1}, "has to be 0 to below 1"),
        ({"undecayed": ["norms"]}, 'has to be one of .*"norm"'),
        ({"groups": [{"match": []}]}, r"\[groups.0\] match = \[\]: has to name"),
        ({"groups": [{"match": ["norm"], "matrices": 0}]}, "has to be 1 or more"),
        ({"groups": [{"match": ["norm"], "frozen": True, "weight_decay": 0}]}, "nothing else"),
        ({"adamw_learning_rate": 1e-3}, 'beside kind = "muon"; write learning_rate'),
        ({"precision": "bf16"}, '"autocast"'),
    ],
)
def test_settings_that_break_a_rule(values: Any, told: str) -> None:
    with pytest.raises(SettingError, match=told):
        build(OptimizerSettings, values)
