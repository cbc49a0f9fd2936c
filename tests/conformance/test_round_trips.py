"""Checkpoints go through Transformers and back, or through here, and stay what they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.families import FAMILIES, Family

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every head in one dtype, the language model in all, so that each pair is seen somewhere.
CASES = [
    pytest.param(family, head, dtype, id=f"{family.name}-{head}-{str(dtype)[6:]}")
    for family in FAMILIES
    for head in family.heads_there
    for dtype in (DTYPES if head == "ForCausalLM" else DTYPES[1:2])
]
each_case = pytest.mark.parametrize(("family", "head", "dtype"), CASES)


def same(one: Any, other: Any, dtype: torch.dtype) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        # Some are float32 here in a model of any dtype, and rounded there.
        assert torch.equal(tensor.to(dtype), second[name].to(dtype)), name


def read_there(kind: type, root: Path) -> Any:
    model, report = kind.from_pretrained(root, output_loading_info=True)  # type: ignore[attr-defined]
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not report["unexpected_keys"]
    return model


@each_case
def test_theirs_comes_back_to_them(
    family: Family, head: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = family.twins(head, {}, "sdpa")[1].to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    ours = family.cls(head).from_pretrained(tmp_path / "theirs")
    assert ours.dtype == dtype
    ours.save_pretrained(tmp_path / "ours", max_shard_size="70KB")
    same(theirs, read_there(type(theirs), tmp_path / "ours"), dtype)


@each_case
def test_ours_comes_back_to_us(
    family: Family, head: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    ours, theirs = family.twins(head, {}, "sdpa")
    ours.to(dtype).save_pretrained(tmp_path / "ours", max_shard_size="40KB")
    there = read_there(type(theirs), tmp_path / "ours")
    there.save_pretrained(tmp_path / "theirs")
    again = family.cls(head).from_pretrained(tmp_path / "theirs")
    same(again, ours, dtype)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters"):
        assert vars(again.config)[key] == vars(ours.config)[key]
