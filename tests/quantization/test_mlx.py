"""Files of MLX: groups with offsets, embeddings among them, experts in stacks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import packers
from conformance.families import FAMILIES, Family
from quintet import AutoModelForCausalLM
from quintet.errors import CheckpointError, ConfigError
from quintet.quantization import Quantized, QuantizedEmbedding
from quintet.quantization.mlx import MLXConfig
from support import relative_error

IDS = torch.arange(1, 23).view(2, 11)
WIDE: dict[str, dict[str, int]] = {
    "qwen2": {},
    "qwen2-moe": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "deepseek-v3": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "v_head_dim": 16,
    },
}
each = pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in WIDE], ids=repr)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


def quantised(weight: Tensor, bits: int) -> tuple[dict[str, Tensor], Tensor]:
    """A scale and an offset for 32 neighbours."""
    groups = weight.unflatten(-1, (-1, 32)).float()
    low, high = groups.amin(-1), groups.amax(-1)
    scale, offset = ((high - low) / (2**bits - 1)).bfloat16(), low.bfloat16()
    by, more = scale.float()[..., None], offset.float()[..., None]
    levels = ((groups - more) / by).round().clamp(0, 2**bits - 1)
    tensors = {
        "weight": packers.words(levels.flatten(-2).long(), bits).view(torch.uint32),
        "scales": scale,
        "biases": offset,
    }
    return tensors, (levels * by + more).flatten(-2)


def written(family: Family, root: Path, bits: int = 4) -> Any:
    """Write a model as MLX does, its routers in 8 bits, and return one of its numbers."""
    torch.manual_seed(2)
    model = family.model_of(**{**family.rounded, **WIDE[family.name]})
    model.save_pretrained(root)
    tensors, plain = load_file(root / "model.safetensors"), {}
    own: dict[str, Any] = {}
    for name in [n for n in tensors if tensors[n].ndim == 2 and tensors[n].shape[1] % 32 == 0]:
        path, router = name.removesuffix(".weight"), name.endswith("mlp.gate.weight")
        if router:
            own[path] = {"group_size": 32, "bits": 8}
        parts, plain[name] = quantised(tensors.pop(name), 8 if router else bits)
        tensors |= {f"{path}.{ending}": part for ending, part in parts.items()}
    rest = {n: t for n, t in tensors.items() if n not in plain and "scales" not in n}
    for name in [n for n in tensors if ".experts.0." in n]:
        experts = [name.replace(".experts.0.", f".experts.{e}.") for e in range(1000)]
        stack = torch.stack([tensors.pop(e) for e in experts if e in tensors])
        tensors[name.replace(".experts.0.", ".switch_mlp.")] = stack
    save_file(tensors, root / "model.safetensors", metadata={"format": "mlx"})
    config = json.loads((root / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": bits, "mode": "affine", **own}
    config["quantization_config"] = config["quantization"]
    (root / "config.json").write_text(json.dumps(config))
    state = {n: t for n, t in rest.items() if not n.endswith(".biases")} | plain
    return type(model).from_pretrained(None, config=model.config, state_dict=state)


@pytest.mark.parametrize("bits", [4, 8])
@each
def test_a_model_computes_with_what_its_files_mean(
    family: Family, bits: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    plain = written(family, tmp_path, bits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert relative_error(logits_of(model), logits_of(plain)) < 2e-3
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert any(isinstance(m, Quantized) for m in model.model.layers[1].mlp.modules())
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32")
    assert torch.equal(logits_of(model), logits_of(again))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3, "group_size": 64}, "bits=3 has to be one of 4, 8"),
        ({"bits": 4, "group_size": 48}, "group_size=48"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mode='mxfp4'"),
        ({"bits": 4, "group_size": 32, "a.b": {"bits": 6}}, "bits=6"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MLXConfig.from_dict(settings)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    written(FAMILIES[0], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.biases"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(CheckpointError, match=r"1 missing:\s+model\.layers\.1\.mlp\.up_proj\.bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
