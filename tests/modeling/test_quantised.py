"""Weights that need scales are refused, never read as if they were plain numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quintet import AutoModelForCausalLM, Qwen2ForCausalLM
from quintet.errors import CheckpointError, InputError, UnsupportedModelError
from support import small_config


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Qwen2ForCausalLM(small_config()).save_pretrained(tmp_path)
    return tmp_path


def test_a_config_that_says_so_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quant_method='fp8'"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_weights_of_one_byte_are_refused_by_name(saved: Path, dtype: torch.dtype) -> None:
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (tensors[name] * 100).to(dtype)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is stored as {dtype}"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_asking_for_quantisation_says_that_it_is_not_here(saved: Path) -> None:
    with pytest.raises(InputError, match="load_in_8bit: quantisation is not in this version"):
        AutoModelForCausalLM.from_pretrained(saved, load_in_8bit=True)
