"""What a model is compared with lies in parts, too, and what is learned of it is the same."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.cases import beside, training
from parallel.cases.tensor import family
from parallel.pool import Pool
from quintet.checkpoint import Checkpoint
from quintet.training import train
from trainings import Heard, material, settings

FAMILIES = ["qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3", "zamba2"]
PAIRS: dict[str, Any] = {
    "data": {"files": "pairs.jsonl", "batch_rows": 4},
    "objective": {"kind": "preference"},
    "train": {"steps": 4},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of all families that are others than those which learn."""
    root = tmp_path_factory.mktemp("others")
    for name in FAMILIES:
        model = family(name).model_of()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("qwen2", {"fsdp": 2}),
        ("deepseek-v3", {"fsdp": 2, "ep": 2}),
        ("qwen2-moe", {"tp": 2}),
        ("deepseek-v2", {"tp": 2, "ep": 2}),
        ("zamba2", {"tp": 2}),
        ("qwen2", {"cp": 2}),
        ("zamba2", {"cp": 2}),
        *((name, {"pp": 2}) for name in FAMILIES),
    ],
    ids=str,
)
def test_a_model_beside_lies_in_parts(
    name: str, degrees: dict[str, Any], folders: dict[str, Path], two: Pool
) -> None:
    two.run(beside.learns, name, folders[name], degrees)


@pytest.mark.parametrize("degrees", [{"tp": 2, "fsdp": 2}, {"pp": 2, "fsdp": 2}], ids=str)
def test_a_model_beside_lies_in_four_parts(
    degrees: dict[str, Any], folders: dict[str, Path], four: Pool
) -> None:
    four.run(beside.learns, "qwen2", folders["qwen2"], degrees)


def test_another_model_that_cannot_be_cut_is_told(tmp_path: Path, two: Pool) -> None:
    other = family("qwen2").model_of(num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    other.save_pretrained(tmp_path)
    for told in two.run(beside.refused, tmp_path, {"tp": 2}):
        assert "[objective] teacher = " in told
        assert "num_attention_heads=3 cannot be given to tp=2" in told


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("degrees", [{"fsdp": 2}, {"pp": 2}], ids=["fsdp", "pp"])
def test_preferences_are_learned_against_the_model_as_it_was(
    degrees: dict[str, int], root: Path, tmp_path: Path, two: Pool
) -> None:
    train(settings(root, tmp_path / "alone", "qwen2_moe", **PAIRS), report=(heard := Heard()))
    config = settings(root, tmp_path / "both", "qwen2_moe", **PAIRS, parallel=degrees)
    shorter = replace(config, train=replace(config.train, steps=2))
    # Who goes on has trained weights, and is compared with those of the beginning.
    losses = {**two.run(training.run, shorter)[0][0], **two.run(training.run, config, True)[0][0]}
    assert losses == pytest.approx(heard.losses, rel=1e-4)
    assert losses[4] < 0.69


@pytest.fixture(scope="module")
def taught(root: Path) -> dict[str, Any]:
    """An adapter that was taught texts, and the settings that go on with it."""
    start = train(settings(root, root / "base", "qwen2_moe", train={"steps": 1})).path
    tables: dict[str, Any] = {"model": {"from": str(start), "config": None}}
    rate = {"optimizer": {"learning_rate": 0.1}}
    more = {**tables, **rate, "adapter": {"r": 2, "experts": True}, "train": {"steps": 3}}
    adapter = train(settings(root, root / "taught", "qwen2_moe", **more)).path
    return {**tables, **PAIRS, "adapter": {"from": str(adapter)}}


def test_an_adapter_that_is_gone_on_with_is_compared_with_itself(
    taught: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    heard, again = Heard(), Heard()
    result = train(settings(root, tmp_path / "one", "qwen2_moe", **taught), report=heard)
    first, *_, last = heard.records
    assert first.loss == pytest.approx(math.log(2), abs=1e-6)
    assert abs(last.loss - first.loss) > 1e-4
    # As with a second model that has it.
    named = {**PAIRS["objective"], "reference": taught["adapter"]["from"]}
    config = settings(root, tmp_path / "two", "qwen2_moe", **{**taught, "objective": named})
    train(config, report=again)
    assert again.losses == pytest.approx(heard.losses, rel=1e-6)
    assert {path.name for path in result.path.iterdir()} >= {"adapter_model.safetensors"}
    assert not (result.path / "reference").exists()


@pytest.mark.parametrize(
    ("degrees", "compared"),
    [
        ({"fsdp": 2}, "itself"),
        ({"tp": 2, "ep": 2}, "itself"),
        ({"tp": 2}, "base"),
        ({"pp": 2}, "named"),
        ({"pp": 2}, "base"),
    ],
    ids=str,
)
def test_adapters_that_are_compared_lie_in_parts(
    degrees: dict[str, int],
    compared: str,
    taught: dict[str, Any],
    root: Path,
    tmp_path: Path,
    two: Pool,
) -> None:
    tables = {**taught, "report": {"peak_flops": 1e12}}
    if compared == "named":
        reference = taught["adapter"]["from"]
        tables["objective"] = {**tables["objective"], "reference": reference}
    if compared == "base":
        tables["adapter"] = {"r": 2, "init_lora_weights": False}
    wanted = train(
        settings(root, tmp_path / "alone", "qwen2_moe", **tables), report=(heard := Heard())
    )
    config = settings(root, tmp_path / "both", "qwen2_moe", **tables, parallel=degrees)
    shorter = replace(config, train=replace(config.train, steps=2))
    losses = {**two.run(training.run, shorter)[0][0], **two.run(training.run, config, True)[0][0]}
    assert losses == pytest.approx(heard.losses, rel=1e-4)
    both = tmp_path / "both" / wanted.path.name
    texts = [(path / "adapter_config.json").read_text() for path in (wanted.path, both)]
    assert texts[0] == texts[1]
    files = [Checkpoint.open(path, stem="adapter_model") for path in (wanted.path, both)]
    found = [dict(one.read(one.tensors)) for one in files]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4)
