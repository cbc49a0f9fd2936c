"""Checkpoints that another program quantised, on the command line: what they are is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import packers
from conformance.families import FAMILIES
from quintet import AutoModelForCausalLM
from quintet.cli.options import has_kernels
from quintet.quantization.formats import FP8Format, Int4Format
from quintet.quantization.ordered import OrderedFormat


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A model in 4 bits with zero points."""

    def pack(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return packers.gptq(weight, group=32, symmetric=False)

    root = tmp_path / "packed"
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    packers.packed_checkpoint(FAMILIES[0], root, pack, {**settings, "desc_act": False})
    return root


def test_a_plan_counts_what_will_be_held(packed: Path, quintet: Any) -> None:
    planned = json.loads(quintet("plan", packed, "--json").out)
    model = AutoModelForCausalLM.from_pretrained(packed)
    tensors = [*model.parameters(), *model.buffers()]
    assert planned["weights"] == sum(t.nbytes for t in tensors if t.dtype != torch.int64)


def test_it_is_named_verified_and_converted(packed: Path, tmp_path: Path, quintet: Any) -> None:
    assert json.loads(quintet("info", packed, "--json").out)["quantised"] == "GPTQ"
    assert quintet("verify", packed).code == 0
    assert quintet("convert", packed, tmp_path / "ours").code == 0
    assert json.loads(quintet("info", tmp_path / "ours", "--json").out)["quantised"] == "Mixed"
    assert quintet("verify", tmp_path / "ours").code == 0
    plans = [json.loads(quintet("plan", p, "--json").out) for p in (packed, tmp_path / "ours")]
    assert plans[0]["weights"] == plans[1]["weights"]


def test_what_is_damaged_inside_is_found(packed: Path, quintet: Any) -> None:
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"] += 7
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    result = quintet("verify", packed)
    assert result.code == 4
    assert "layers.1.mlp.up_proj.weight: g_idx goes from 7" in result.err


def test_integers_are_written_for_vllm(tmp_path: Path, quintet: Any) -> None:
    plain, one, other = (tmp_path / name for name in ("plain", "one", "other"))
    FAMILIES[0].model_of(intermediate_size=128).save_pretrained(plain)
    assert quintet("quantize", plain, one, "--to", "w4a16", "--keep", "up_proj").code == 0
    settings = json.loads((one / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized"
    assert {"lm_head", "model.layers.0.mlp.up_proj"} < set(settings["ignore"])
    assert quintet("convert", one, other, "--to", "compressed-tensors").code == 0
    first, second = (load_file(root / "model.safetensors") for root in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert quintet("convert", plain, tmp_path / "no", "--to", "compressed-tensors").code == 2


def test_an_order_of_inputs_is_no_reason_to_be_slow() -> None:
    assert has_kernels(OrderedFormat(Int4Format()))
    assert not has_kernels(OrderedFormat(FP8Format()))
