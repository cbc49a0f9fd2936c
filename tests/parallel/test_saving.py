"""A model that several processes hold is saved as one ordinary checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from families import zamba2
from parallel.cases import saving
from parallel.cases.loading import KINDS, WIDE
from parallel.cases.tensor import family
from parallel.pool import Pool


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def check(folder: Path) -> None:
    """Compare two checkpoints: names of files, configurations, tensors to the bit."""
    one, several = (folder / name for name in ("one", "several"))
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in several.iterdir()) == names
    for name in names:
        if name.endswith("config.json"):
            assert json.loads((one / name).read_text()) == json.loads((several / name).read_text())
    expected, found = tensors(one), tensors(several)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        same = torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
        assert same, name


@pytest.mark.parametrize(
    ("name", "changes", "degrees"),
    [
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}, {"tp": 2}),
        ("qwen2-moe", {}, {"tp": 2}),
        ("deepseek-v2", {"attention_bias": True, "mlp_bias": True}, {"tp": 2}),
        ("deepseek-v3", {}, {"tp": 2, "ep": 2}),
        ("qwen2", {"tie_word_embeddings": True}, {"pp": 2}),
        ("deepseek-v3", {}, {"pp": 2}),
        ("zamba2", zamba2.TWO_BLOCKS, {"pp": 2}),
        ("zamba2", {**zamba2.TWO_BLOCKS, "use_shared_attention_adapter": True}, {"tp": 2}),
    ],
    ids=str,
)
def test_it_is_what_one_process_saves(
    name: str, changes: dict[str, Any], degrees: dict[str, int], tmp_path: Path, two: Pool
) -> None:
    model = family(name).model_of(**changes)
    model.save_pretrained(tmp_path / "source")
    two.run(saving.save, name, tmp_path / "source", tmp_path, degrees, {}, "100kB")
    check(tmp_path)
    found, expected = tensors(tmp_path / "several"), tensors(tmp_path / "source")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "kind", "degrees"),
    [
        *(("qwen2", kind, {"tp": 2}) for kind in KINDS),
        ("qwen2-moe", "int4", {"tp": 2, "ep": 2}),
        ("qwen2-moe", "fp8", {"tp": 2}),
        ("qwen2-moe", "int4", {"pp": 2}),
    ],
)
def test_in_fewer_bits_it_is_what_one_process_saves(
    name: str, kind: str, degrees: dict[str, int], tmp_path: Path, two: Pool
) -> None:
    family(name).model_of(**WIDE[name]).save_pretrained(tmp_path / "source")
    two.run(saving.save, name, tmp_path / "source", tmp_path, degrees, KINDS[kind], "5GB")
    check(tmp_path)


def test_a_full_disk_ends_all_with_one_message_and_the_old_checkpoint(
    tmp_path: Path, two: Pool
) -> None:
    family("qwen2").model_of().save_pretrained(tmp_path / "source")
    said = two.run(saving.fill_disk, tmp_path / "source", tmp_path / "target")
    assert said[0] == said[1]
    assert "rank 0 failed while it saved: could not save into" in said[0]
    assert "No space left on device" in said[0]
    source, target = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    assert all(torch.equal(target[name], tensor) for name, tensor in source.items())


def test_what_the_first_is_not_to_write_nobody_writes(tmp_path: Path, two: Pool) -> None:
    family("qwen2").model_of().save_pretrained(tmp_path / "source")
    two.run(saving.nothing, tmp_path / "source", tmp_path / "target")


def test_slices_of_weights_are_joined(tmp_path: Path, two: Pool) -> None:
    family("qwen2").model_of().save_pretrained(tmp_path / "source")
    two.run(saving.slices, tmp_path / "source", tmp_path / "target")
    source, target = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    assert list(target) == list(source)
    assert all(torch.equal(target[name], tensor) for name, tensor in source.items())
