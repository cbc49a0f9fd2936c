"""What a model is compared with lies in parts, too, and what is learned of it is the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.cases import beside, training
from parallel.cases.tensor import family
from parallel.pool import Pool
from quintet.training import train
from trainings import Heard, material, settings

FAMILIES = ["qwen2", "qwen2-moe", "deepseek-v2", "deepseek-v3", "zamba2"]


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
        ("zamba2", {"fsdp": 2}),
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


@pytest.mark.parametrize(
    ("name", "degrees"),
    [("zamba2", {"tp": 2, "fsdp": 2}), ("qwen2", {"pp": 2, "fsdp": 2})],
    ids=str,
)
def test_a_model_beside_lies_in_four_parts(
    name: str, degrees: dict[str, Any], folders: dict[str, Path], four: Pool
) -> None:
    four.run(beside.learns, name, folders[name], degrees)


def test_another_model_that_cannot_be_cut_is_told(tmp_path: Path, two: Pool) -> None:
    other = family("qwen2").model_of(num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    other.save_pretrained(tmp_path)
    for told in two.run(beside.refused, tmp_path, {"tp": 2}):
        assert "[objective] teacher = " in told
        assert "num_attention_heads=3 cannot be given to tp=2" in told


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return material(tmp_path_factory.mktemp("material"))


@pytest.mark.parametrize("degrees", [{"fsdp": 2}, {"tp": 2}, {"pp": 2}], ids=["fsdp", "tp", "pp"])
def test_preferences_are_learned_against_the_model_as_it_was(
    degrees: dict[str, int], root: Path, tmp_path: Path, two: Pool
) -> None:
    tables: dict[str, Any] = {
        "data": {"files": "pairs.jsonl", "batch_rows": 4},
        "objective": {"kind": "preference"},
        "train": {"steps": 4},
    }
    train(settings(root, tmp_path / "alone", "qwen2_moe", **tables), report=(heard := Heard()))
    config = settings(root, tmp_path / "both", "qwen2_moe", **tables, parallel=degrees)
    shorter = replace(config, train=replace(config.train, steps=2))
    # Who goes on has trained weights, and is compared with those of the beginning.
    losses = {**two.run(training.run, shorter)[0][0], **two.run(training.run, config, True)[0][0]}
    assert losses == pytest.approx(heard.losses, rel=1e-4)
    assert losses[4] < 0.69
