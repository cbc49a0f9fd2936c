"""Checkpoints that become others: in all families, tensor by tensor, whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conformance.families import Family, each
from quintet import Qwen2ForCausalLM
from quintet.checkpoint import Checkpoint
from quintet.conversion import convert
from quintet.errors import CheckpointError, InputError
from support import small_config


def changes_of(family: Family) -> dict[str, Any]:
    return {"num_nextn_predict_layers": 1} if family.name == "deepseek-v3" else {}


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint.open(root).read(Checkpoint.open(root).tensors))


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    configs = [json.loads((root / "config.json").read_text()) for root in (one, other)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("method", ["int8", "int4", "nf4", "fp8"])
@each
def test_it_writes_what_a_loaded_model_saves(family: Family, method: str, tmp_path: Path) -> None:
    plain, converted, saved = (tmp_path / name for name in ("plain", "converted", "saved"))
    cls = family.cls("ForCausalLM")
    family.model_of(**changes_of(family)).to(torch.bfloat16).save_pretrained(plain)
    done = convert(plain, converted, quantize=method, max_shard_size="40KB")
    cls.from_pretrained(plain, quantize=method).save_pretrained(saved)
    assert_same(converted, saved)
    assert done.written == sum(t.nbytes for t in tensors_of(converted).values())
    assert done.read == sum(t.nbytes for t in tensors_of(plain).values())
    assert len(list(converted.glob("*.safetensors"))) > 1
    # And back: what it stands for, as plain numbers.
    convert(converted, tmp_path / "back", quantize="none")
    cls.from_pretrained(converted, quantize="none").save_pretrained(tmp_path / "loaded")
    assert_same(tmp_path / "back", tmp_path / "loaded")


@each
def test_plain_numbers_get_another_dtype_and_other_shards(family: Family, tmp_path: Path) -> None:
    plain, half = tmp_path / "plain", tmp_path / "half"
    cls = family.cls("ForCausalLM")
    family.model_of(**changes_of(family)).save_pretrained(plain)
    convert(plain, half, dtype="bfloat16", max_shard_size="100KB")
    cls.from_pretrained(plain, dtype="bfloat16").save_pretrained(tmp_path / "saved")
    assert_same(half, tmp_path / "saved")
    convert(half, tmp_path / "again")
    assert_same(half, tmp_path / "again")


def test_names_and_stacks_become_those_of_a_release(tmp_path: Path) -> None:
    from conformance.families import FAMILIES

    family = next(f for f in FAMILIES if f.name == "qwen2-moe")
    released, odd = tmp_path / "released", tmp_path / "odd"
    model = family.model_of().to(torch.bfloat16)
    model.save_pretrained(released)
    odd.mkdir()
    # Stacked as in memory.
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        odd / "model.safetensors",
        metadata={"format": "pt"},
    )
    (odd / "config.json").write_text((released / "config.json").read_text())
    for method in (None, "int8"):
        convert(released, tmp_path / f"a{method}", quantize=method)
        convert(odd, tmp_path / f"b{method}", quantize=method)
        ours, theirs = tensors_of(tmp_path / f"a{method}"), tensors_of(tmp_path / f"b{method}")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_failure_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    plain, target = tmp_path / "plain", tmp_path / "target"
    Qwen2ForCausalLM(small_config()).save_pretrained(plain)
    convert(plain, target, dtype="bfloat16")
    before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    tensors = load_file(plain / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.2.mlp.up_proj.weight: .*infinite"):
        convert(plain, target, quantize="int8", max_shard_size="50KB")
    after = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    assert before == after
    Qwen2ForCausalLM.from_pretrained(target)


def test_a_model_is_not_written_over_itself(tmp_path: Path) -> None:
    Qwen2ForCausalLM(small_config()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the source itself"):
        convert(tmp_path, tmp_path, quantize="int8")


def test_every_file_of_the_tokenizer_comes_along(chat_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(chat_model, tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (source / "tokenizer.model").write_bytes(b"\x0a\xff\x00")
    convert(source, tmp_path / "target", dtype="bfloat16")
    files = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and path.suffix != ".safetensors" and path.name != "config.json"
    }
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "target" / file).read_bytes() == (source / file).read_bytes(), file
