"""Processes that train together learn what one does that reads all their batches."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.cases import training
from parallel.pool import Pool
from quintet import AutoModelForCausalLM
from quintet.training import TrainingConfig, train
from quintet.training.parallel import ParallelSettings
from trainings import MODELS, Heard, material, settings

FSDP2, DP2 = {"fsdp": 2}, {"dp": 2, "fsdp": 1}
TP2, EP2 = {"tp": 2}, {"tp": 2, "ep": 2}
PP2, CP2, CP2_TP2, CP2_FSDP2 = (
    {"pp": 2},
    {"cp": 2},
    {"cp": 2, "tp": 2},
    {"cp": 2, "fsdp": 2},
)
# Experts are among processes with batches of their own, which send each other tokens.
SENT2, SENT4 = {"fsdp": 2, "ep": 2}, {"tp": 2, "fsdp": 2, "ep": 4}
SENT2_COPIES, SENT2_HSDP = {"fsdp": 4, "ep": 2}, {"dp": 2, "fsdp": 2, "ep": 2}
SLICES2 = {"tp": 2, "sequence_parallel": True}
PP2_TP2, PP2_FSDP2, PP2_CP2 = {"pp": 2, "tp": 2}, {"pp": 2, "fsdp": 2}, {"pp": 2, "cp": 2}
HSDP, TP2_FSDP2 = {"dp": 2, "fsdp": 2}, {"tp": 2, "fsdp": 2}
FAMILIES = ["qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3", "zamba2"]
PREDICTS = {"num_nextn_predict_layers": 2}
MIXTURES = ["qwen2-moe", "deepseek-v2", "deepseek-v3"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "degrees", [FSDP2, TP2, SLICES2, CP2, PP2], ids=["fsdp", "tp", "slices", "cp", "pp"]
)
def test_gradients_in_two_processes_are_those_of_one(
    name: str, degrees: dict[str, int | bool], two: Pool
) -> None:
    two.run(training.gradients, name, {}, degrees, {})


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("degrees", [EP2, SENT2, PP2], ids=["shared", "sent", "pp"])
def test_gradients_of_experts_in_two_processes_are_those_of_one(
    name: str, degrees: dict[str, int], two: Pool
) -> None:
    two.run(training.gradients, name, {}, degrees, training.LOSSES[name])


# Some experts are asked for nothing at all.
@pytest.mark.parametrize(
    ("name", "changes", "degrees"),
    [
        ("deepseek-v3", {}, SENT4),
        ("deepseek-v2", {"num_experts_per_tok": 1}, SENT2_COPIES),
        ("qwen2-moe", {}, SENT2_COPIES),
        ("deepseek-v3", {}, SENT2_HSDP),
    ],
)
def test_gradients_of_experts_with_copies_are_summed_once(
    name: str, changes: dict[str, Any], degrees: dict[str, int], four: Pool
) -> None:
    four.run(training.gradients, name, changes, degrees, training.LOSSES[name])


@pytest.mark.parametrize(
    ("name", "balance"),
    [
        ("qwen2-moe", {"auxiliary": 0.1, "z": 0.01}),
        ("qwen2-moe", {"auxiliary": 0.1, "z": 0.01, "scope": "sequence"}),
        ("qwen2-moe", {"auxiliary": 0.1, "scope": "global"}),
        (
            "deepseek-v2",
            {"expert": 0.1, "device": 0.1, "communication": 0.1, "devices": 2, "reached": 1},
        ),
        ("deepseek-v3", {"sequence": 0.1}),
    ],
)
def test_losses_of_balance_see_all_tokens_of_shared_rows(
    name: str, balance: dict[str, Any], two: Pool
) -> None:
    changes = PREDICTS if name == "deepseek-v3" else {}
    two.run(training.gradients, name, changes, CP2, balance, training.several_texts)


def test_stages_share_rows_of_several_texts(four: Pool) -> None:
    four.run(
        training.gradients,
        *("deepseek-v3", PREDICTS, PP2_CP2, training.LOSSES["deepseek-v3"]),
        training.several_texts,
    )
    # A row that is shorter than the chunks that fill it up.
    four.run(training.gradients, "zamba2", {}, PP2_CP2, {}, training.short)


@pytest.mark.parametrize("degrees", [CP2, PP2], ids=["cp", "pp"])
def test_other_objectives_learn_as_in_one_process(degrees: dict[str, int], two: Pool) -> None:
    two.run(training.other_objectives, "qwen2", degrees)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "degrees",
    [HSDP, TP2_FSDP2, CP2_TP2, CP2_FSDP2, PP2_TP2, PP2_FSDP2, PP2_CP2],
    ids=["hsdp", "tp-fsdp", "cp-tp", "cp-fsdp", "pp-tp", "pp-fsdp", "pp-cp"],
)
def test_gradients_in_four_processes_are_those_of_one(
    name: str, degrees: dict[str, int], four: Pool
) -> None:
    four.run(training.gradients, name, {}, degrees, {})


@pytest.mark.parametrize(
    ("name", "degrees"),
    [("qwen2-moe", SLICES2 | {"fsdp": 2}), ("zamba2", SLICES2 | {"pp": 2})],
    ids=str,
)
def test_gradients_of_slices_of_tokens_in_four_processes_are_those_of_one(
    name: str, degrees: dict[str, int | bool], four: Pool
) -> None:
    four.run(training.gradients, name, {}, degrees, {})


def test_gradients_of_copies_are_those_of_one_process(two: Pool) -> None:
    two.run(training.gradients, "qwen2", {}, DP2, {})


def test_gradients_of_what_both_ends_have_are_those_of_one_process(two: Pool) -> None:
    two.run(training.gradients, "qwen2", {"tie_word_embeddings": True}, PP2, {})
    two.run(training.gradients, "deepseek-v3", PREDICTS, PP2, {}, training.several_texts)


@pytest.mark.parametrize(
    ("name", "degrees", "count"),
    [("qwen2", FSDP2, 8), ("deepseek-v3", EP2, 6), ("zamba2", CP2, 3)],
)
def test_steps_in_two_processes_are_those_of_one(
    name: str, degrees: dict[str, int], count: int, two: Pool
) -> None:
    two.run(training.steps, name, degrees, count, {})


@pytest.mark.parametrize("degrees", [FSDP2, TP2, SENT2], ids=["fsdp", "tp", "sent"])
def test_muon_moves_whole_matrices(degrees: dict[str, int], two: Pool) -> None:
    two.run(training.steps, "qwen2-moe", degrees, 3, {"kind": "muon"})


@pytest.mark.parametrize(("name", "degrees"), [("qwen2-moe", SENT2_COPIES), ("zamba2", TP2_FSDP2)])
def test_steps_in_four_processes_are_those_of_one(
    name: str, degrees: dict[str, int], four: Pool
) -> None:
    four.run(training.steps, name, degrees, 3, {})


@pytest.mark.parametrize("vocabulary", [10, 7, 1])
def test_a_head_of_some_ids_each_has_the_sums_of_all(vocabulary: int, two: Pool) -> None:
    two.run(training.heads, TP2, vocabulary)


@pytest.mark.parametrize("degrees", [FSDP2, CP2, SENT2], ids=["fsdp", "cp", "sent"])
def test_biases_are_the_same_to_the_bit_with_and_without_recomputation(
    degrees: dict[str, int], two: Pool
) -> None:
    once, again = (
        two.run(partial(training.balances, recompute=recompute), degrees, 3)
        for recompute in (False, True)
    )
    assert once[0] == once[1]
    assert once == again


def test_skewed_experts_are_balanced_by_the_loads_of_all(two: Pool) -> None:
    balances = partial(training.balances, recompute=False, rate=0.02)
    assert two.run(balances, DP2, 1)[0][1] > 0.5
    (biases, violation), other = two.run(balances, DP2, 60)
    assert other == (biases, violation)
    assert violation < 0.2


# -- whole trainings -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material(tmp_path_factory.mktemp("material"))


def shorter(config: TrainingConfig, steps: int) -> TrainingConfig:
    return replace(config, train=replace(config.train, steps=steps))


@pytest.mark.parametrize("degrees", [FSDP2, CP2, PP2], ids=["fsdp", "cp", "pp"])
def test_a_run_goes_on_in_one_process_and_in_two_to_the_same(
    degrees: dict[str, int], root: Path, tmp_path: Path, two: Pool
) -> None:
    heard = Heard()
    alone = train(settings(root, tmp_path / "alone"), report=heard)
    config = settings(root, tmp_path / "both")
    divided = replace(config, parallel=ParallelSettings(**degrees))
    losses = two.run(training.run, shorter(divided, 2))[0][0]
    train(shorter(config, 4), resume=True, report=(then := Heard()))
    last, warned = two.run(training.run, divided, True)[0]
    for step, loss in {**losses, **then.losses, **last}.items():
        assert loss == pytest.approx(heard.losses[step], rel=1e-4)
    (axis,) = degrees
    assert f"processes is {axis}=2, and was 1" in warned[-1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "both" / alone.path.name)
    for name, weight in alone.model.named_parameters():
        if "k_proj.bias" not in name:
            torch.testing.assert_close(again.get_parameter(name), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_stages_are_measured_and_write_as_one_process(
    kind: str, root: Path, tmp_path: Path, two: Pool
) -> None:
    tables: dict[str, Any] = {
        "data": {"held_out_sources": [{"paths": [str(root / "held.txt")]}]},
        "evaluation": {"every": 1, "prompts": ["The quick"], "max_new_tokens": 8},
        "train": {"steps": 2, "recompute": True},
        # No stage has parameters of all groups.
        "optimizer": {"groups": [{"match": ["*.layers.0.*"], "learning_rate": 0.5}]},
    }
    if kind == "qwen2_moe":
        tables |= {"balance": {"auxiliary": 0.1, "scope": "global"}}
    if kind == "deepseek_v3":
        tables |= {"objective": {"prediction": 0.3}, "balance": {"bias": 0.01}}
    heard = Heard()
    alone = train(settings(root, tmp_path / "alone", kind, **tables), report=heard)
    config = settings(root, tmp_path / "both", kind, **tables, parallel=PP2)
    (losses, evaluations, written, balance, banner), (_, nothing, *_) = two.run(
        training.told, config
    )
    assert losses == pytest.approx(heard.losses, rel=1e-4)
    for found, wanted in zip(evaluations, heard.evaluations, strict=True):
        assert found.scored == wanted.scored
        assert found.bits_per_byte == pytest.approx(wanted.bits_per_byte, rel=1e-4)
        assert found.agreement == wanted.agreement
        assert found.balance == wanted.balance
    assert written == [sample.text for sample in heard.samples]
    assert balance == [record.balance for record in heard.records]
    size = sum(parameter.numel() for parameter in alone.model.parameters())
    assert f"{size:,} parameters" in banner
    # The first process tells.
    assert not nothing


def test_slices_of_tokens_are_recomputed_and_measured_as_whole_rows(
    root: Path, tmp_path: Path, two: Pool
) -> None:
    tables: dict[str, Any] = {
        "data": {"held_out_sources": [{"paths": [str(root / "held.txt")]}]},
        "evaluation": {"every": 2},
        "train": {"steps": 4, "recompute": True},
        "objective": {"prediction": 0.3},
    }
    train(settings(root, tmp_path / "alone", "deepseek_v3", **tables), report=(heard := Heard()))
    config = settings(root, tmp_path / "both", "deepseek_v3", **tables, parallel=SLICES2)
    losses, evaluations, *_ = two.run(training.told, config)[0]
    assert losses == pytest.approx(heard.losses, rel=1e-4)
    for found, wanted in zip(evaluations, heard.evaluations, strict=True):
        assert found.bits_per_byte == pytest.approx(wanted.bits_per_byte, rel=1e-4)


def test_what_stages_do_not_do_is_told_before_anything_is_made(
    root: Path, tmp_path: Path, two: Pool
) -> None:
    config = settings(root, tmp_path / "run", parallel=PP2, train={"compile": True})
    both = two.run(training.refused, config)
    assert both[0] == both[1]
    assert "is for layers that all are here" in both[0]
    assert not (tmp_path / "run").exists()


def test_as_many_processes_go_on_to_the_bit(root: Path, tmp_path: Path, two: Pool) -> None:
    config = settings(root, tmp_path / "whole")
    whole, _ = two.run(training.run, config)[0]
    config = settings(root, tmp_path / "parts")
    two.run(training.run, shorter(config, 3))
    parts, warned = two.run(training.run, config, True)[0]
    assert not warned
    assert parts == {step: loss for step, loss in whole.items() if step > 3}
    names = ("model.safetensors", "training/optimizer.safetensors")
    for name in names:
        made = [tmp_path / run / "step-00000006" / name for run in ("whole", "parts")]
        assert made[0].read_bytes() == made[1].read_bytes()


def test_slices_are_the_masters_of_weights_in_bfloat16(
    root: Path, tmp_path: Path, two: Pool
) -> None:
    low = {"precision": "bfloat16"}
    train(settings(root, tmp_path / "alone", optimizer=low), report=(heard := Heard()))
    config = settings(root, tmp_path / "both", optimizer=low)
    losses, _ = two.run(training.run, shorter(config, 3))[0]
    # Nothing of what one process goes on with is missing, or more than it has itself.
    train(config, resume=True, report=(then := Heard()))
    for step, loss in {**losses, **then.losses}.items():
        assert loss == pytest.approx(heard.losses[step], rel=1e-2)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "both" / "step-00000003", dtype="auto")
    assert again.dtype == torch.bfloat16
