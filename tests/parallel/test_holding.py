"""Processes that train together hold their parts alone, from the beginning."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.cases import holding
from parallel.cases.tensor import family
from parallel.pool import Pool
from quintet import Qwen2Config
from quintet.modeling.fresh import new_model

FSDP2, TP2, EP2 = {"fsdp": 2}, {"tp": 2}, {"tp": 2, "ep": 2}
SENT, PP2 = {"fsdp": 2, "ep": 2}, {"pp": 2}
NEW: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", FSDP2),
    ("deepseek-v3", EP2),
    ("zamba2", FSDP2),
    ("zamba2", TP2),
    ("qwen2-moe", SENT),
]


@pytest.mark.parametrize(("name", "degrees"), NEW, ids=str)
def test_parts_are_drawn_as_the_whole(name: str, degrees: dict[str, Any], two: Pool) -> None:
    two.run(holding.parts, name, None, degrees, "float32", "float32")


READ: list[tuple[str, dict[str, Any], str, str]] = [
    ("deepseek-v3", FSDP2, "float32", "float32"),
    ("deepseek-v3", SENT, "float32", "float32"),
    ("qwen2", FSDP2, "bfloat16", "bfloat16"),
    ("qwen2-moe", TP2, "float32", "float32"),
    ("zamba2", FSDP2, "float32", "bfloat16"),
]


@pytest.mark.parametrize(("name", "degrees", "precision", "dtype"), READ, ids=str)
def test_parts_are_read_of_the_whole(
    name: str, degrees: dict[str, Any], precision: str, dtype: str, tmp_path: Path, two: Pool
) -> None:
    family(name).model_of().save_pretrained(tmp_path)
    two.run(holding.parts, name, tmp_path, degrees, precision, dtype)


@pytest.mark.parametrize("degrees", [{"tp": 2, "fsdp": 2}, {"tp": 2, "fsdp": 2, "ep": 4}], ids=str)
def test_parts_are_sliced_further(degrees: dict[str, Any], tmp_path: Path, four: Pool) -> None:
    family("deepseek-v3").model_of().save_pretrained(tmp_path)
    four.run(holding.parts, "deepseek-v3", tmp_path, degrees, "float32", "float32")
    four.run(holding.parts, "deepseek-v3", None, degrees, "float32", "float32")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read in /proc")
@pytest.mark.parametrize("saved", [False, True], ids=["new", "read"])
@pytest.mark.parametrize("degrees", [FSDP2, TP2, PP2], ids=["fsdp", "tp", "pp"])
def test_no_process_ever_has_the_whole(
    degrees: dict[str, Any], saved: bool, tmp_path: Path, two: Pool
) -> None:
    if saved:
        cls = family("qwen2").cls("ForCausalLM")
        new_model(cls, Qwen2Config(**holding.SIZES), torch.float32).save_pretrained(tmp_path)
    for part, whole in two.run(holding.peaks, tmp_path if saved else None, degrees):
        assert whole > 0.9
        assert part < 0.8
