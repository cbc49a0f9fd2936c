"""`quintet info`: facts from the files, as a table and as JSON."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import quintet.cli.info as module
from quintet import AutoModelForCausalLM
from quintet.backends import REGISTRY, Backend, Implementation
from quintet.kernels import outlook


def test_the_facts(quintet: Any, chat_model: Path) -> None:
    result = quintet("info", chat_model, "--json")
    assert (result.code, result.err) == (0, "")
    facts = json.loads(result.out)
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert facts.pop("kernels") == outlook()
    served = facts.pop("backends")
    assert set(served) >= {"cpu"}
    assert set(served["on request"]) == {"flash-attn", "flash-mla", "deep-gemm", "mamba-ssm"}
    if not torch.cuda.device_count():
        assert served["on request"]["flash-attn"] == ["there is no CUDA device"]
    assert facts == {
        "model": str(chat_model),
        "family": "qwen2",
        "saved_as": ["Qwen2ForCausalLM"],
        "parameters": model.num_parameters(),
        "active": model.num_parameters(),
        "layers": 2,
        "width": 32,
        "vocabulary": 360,
        "context": 256,
        "weights": {"bytes": weights, "dtypes": {"float32": len(model.state_dict())}, "files": 1},
        "quantised": None,
        "cache": {"bytes_per_token": 256, "bytes_per_row": 0},
        "attention": {"chosen": "sdpa", "also": ["eager"]},
        "tokenizer": {"class": "PreTrainedTokenizer", "tokens": 360, "chat_template": True},
    }


def test_the_table_says_the_same(quintet: Any, chat_model: Path) -> None:
    facts = json.loads(quintet("info", chat_model, "--json").out)
    lines = quintet("info", chat_model).out.splitlines()
    said = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert [key.replace(" ", "_") for key in said] == list(facts)
    assert said["parameters"] == f"{facts['parameters']:,}"
    assert said["weights"] == f"{facts['weights']['bytes']:,} bytes of float32 in 1 file(s)"
    assert (said["quantised"], said["cache"]) == ("no", "256 bytes a token")
    assert said["attention"] == "sdpa; also eager"
    assert said["tokenizer"] == "PreTrainedTokenizer, 360 tokens, with a chat template"


def test_a_backend_is_named_beside_what_it_computes(quintet: Any, chat_model: Path) -> None:
    def told() -> str:
        return str(quintet("info", chat_model).out)

    implementations = {"rms norm": (Implementation(lambda *_: None, frozenset({torch.float32})),)}
    toy = Backend(name="toy", device="cpu", implementations=implementations, missing=lambda: None)
    with REGISTRY.registered(toy):
        assert "on cpu, toy: rms norm" in told()
    assert "toy" not in told()


def test_without_a_model_it_is_the_packaged_one(
    quintet: Any, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "demo_model", lambda: chat_model)
    assert quintet("info").out == quintet("info", chat_model).out


def test_shards_and_dtypes_are_counted(quintet: Any, chat_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(chat_model, dtype="bfloat16")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards > 1
    assert f"bytes of bfloat16 in {shards} file(s)" in quintet("info", tmp_path).out


@pytest.mark.parametrize("content", [None, "{}"], ids=["missing", "damaged"])
def test_an_unusable_tokenizer_is_a_fact(
    quintet: Any, chat_model: Path, tmp_path: Path, content: str | None
) -> None:
    root = Path(shutil.copytree(chat_model, tmp_path / "model"))
    (root / "tokenizer.json").unlink()
    if content is not None:
        (root / "tokenizer.json").write_text(content)
    result = quintet("info", root)
    assert result.code == 0
    assert "tokenizer   unusable: " in result.out


def test_a_damaged_file_is_an_error(quintet: Any, chat_model: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(chat_model, tmp_path / "model"))
    (root / "model.safetensors").write_bytes(b"1234")
    result = quintet("info", root)
    assert (result.code, result.out) == (4, "")
    assert result.is_one_screen
