"""torchao's int8, as Transformers writes it, and its configurations in all the ways to say them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quintet import Int8Config, Qwen2ForCausalLM, TorchAoConfig
from quintet.errors import CheckpointError, ConfigError, UnsupportedModelError
from quintet.quantization import QuantizedLinear
from support import small_config

# What Transformers 5.23.0 with torchao 0.18.0 writes.
WRITTEN: dict[str, Any] = {
    "include_input_output_embeddings": False,
    "modules_to_not_convert": None,
    "quant_method": "torchao",
    "quant_type": {
        "default": {
            "_data": {
                "granularity": {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1},
                "group_size": None,
                "set_inductor_config": True,
            },
            "_type": "Int8WeightOnlyConfig",
            "_version": 2,
        }
    },
    "untie_embedding_weights": False,
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A checkpoint under the names of that writer."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(small_config())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        weight = tensors.pop(name)
        scale = weight.abs().amax(-1, keepdim=True) / 127.5
        path = name.removesuffix("weight") + "_weight_"
        tensors[path + "qdata"] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[path + "scale"] = scale
        tensors[path + "zero_point"] = torch.zeros_like(scale, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": WRITTEN}))
    return tmp_path


def test_int8_files_are_read_and_saved_as_ours(written: Path, tmp_path: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    model = Qwen2ForCausalLM.from_pretrained(written)
    up = model.model.layers[1].mlp.up_proj
    assert isinstance(up, QuantizedLinear)
    assert isinstance(model.lm_head, torch.nn.Linear)
    q, scale = (tensors[f"model.layers.1.mlp.up_proj._weight_{x}"] for x in ("qdata", "scale"))
    torch.testing.assert_close(up.decoded("weight", torch.float32), q * scale, rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path / "again")
    again = Qwen2ForCausalLM.from_pretrained(tmp_path / "again")
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.config.quantization_config["quant_method"] == "quintet"


def test_a_zero_that_is_not_in_the_middle_is_refused(written: Path) -> None:
    tensors = load_file(written / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj._weight_zero_point"] += 1
    save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has a zero_point"):
        Qwen2ForCausalLM.from_pretrained(written)


def test_int4_files_are_refused(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    config["quantization_config"]["quant_type"] = "int4_weight_only"
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="torchao's int4"):
        Qwen2ForCausalLM.from_pretrained(written)


class Int8WeightOnlyConfig:
    """Stands for torchao's class of that name: nothing but its name and values is looked at."""

    def __init__(self, group_size: int | None = None) -> None:
        self.group_size = group_size


@pytest.mark.parametrize(
    "quant_type",
    ["int8_weight_only", WRITTEN["quant_type"], Int8WeightOnlyConfig()],
    ids=["name", "as-written", "object"],
)
def test_a_configuration_can_be_said_in_several_ways(quant_type: Any) -> None:
    assert TorchAoConfig(quant_type=quant_type).ours() == Int8Config(
        modules_to_not_convert=["lm_head"]
    )


def test_what_there_is_no_format_for_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="float8_weight_only"):
        TorchAoConfig(quant_type="float8_weight_only")
    with pytest.raises(ConfigError, match="group_size=32"):
        TorchAoConfig(quant_type=Int8WeightOnlyConfig(32))
