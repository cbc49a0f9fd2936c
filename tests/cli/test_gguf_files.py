"""`info`, `verify` and `plan` of files in GGUF."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind

import ggufwriting
from conformance.families import FAMILIES
from quintet import AutoModelForCausalLM
from quintet.checkpoint import GGUFCheckpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "model.gguf"
    source = FAMILIES[0].model_of(hidden_size=64, num_hidden_layers=2)
    more = ggufwriting.add_tokens
    ggufwriting.write(source, path, kind=lambda name, shape: Kind.Q8_0, more=more)
    return path


@pytest.fixture
def damaged(written: Path, tmp_path: Path) -> Path:
    info = GGUFCheckpoint.open(written).tensors["model.layers.1.mlp.up_proj.weight"]
    content = bytearray(written.read_bytes())
    content[info.start : info.start + 2] = b"\x00\x7c"
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def facts(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_info_says_what_becomes_of_the_tensors(quintet: Any, written: Path) -> None:
    found = facts(quintet("info", written, "--json"))
    assert found["held_as"] == [
        {"stored": "Q8_0", "held": "int8 by 32", "tensors": 16},
        {"stored": "float32", "held": "bfloat16", "tensors": 11},
    ]
    assert found["weights"]["dtypes"] == {"Q8_0": 16, "float32": 11}
    said = quintet("info", written).out
    assert "16 Q8_0 as int8 by 32, 11 float32 as bfloat16" in said


def test_plan_counts_what_is_held(quintet: Any, written: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert facts(quintet("plan", written, "--json"))["weights"] == held


def test_verify_finds_a_whole_file_whole(quintet: Any, written: Path) -> None:
    result = quintet("verify", written, "--json")
    found = facts(result)
    assert (result.code, found["problems"]) == (0, [])
    assert (found["tensors"], found["files"]) == (27, 1)


def test_verify_names_blocks_that_are_no_numbers(quintet: Any, damaged: Path) -> None:
    result = quintet("verify", damaged, "--json")
    assert result.code == 4
    (problem,) = facts(result)["problems"]
    assert problem == (
        "model.gguf: model.layers.1.mlp.up_proj.weight has blocks of Q8_0 with a scale that is not "
        "finite"
    )
    assert facts(quintet("verify", damaged, "--quick", "--json"))["ok"]


def test_verify_knows_blobs_by_their_names(quintet: Any, written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()
    blob = tmp_path / f"sha256-{hashlib.sha256(content).hexdigest()}"
    blob.write_bytes(content)
    assert facts(quintet("verify", blob, "--json"))["hashes"] == "1 of 1 right"
    with blob.open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\x01")
    result = quintet("verify", blob, "--json")
    assert result.code == 4
    assert "has the SHA-256" in facts(result)["problems"][-1]


def test_verify_names_a_file_that_is_cut(quintet: Any, written: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(written.read_bytes()[:-100])
    result = quintet("verify", path, "--json")
    assert result.code == 4
    assert "is truncated" in result.err or "is truncated" in result.out
