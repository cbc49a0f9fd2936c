"""FP8 scales that are powers of two, as DeepSeek has them from V3.1 on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quintet
from conformance.families import FAMILIES
from quintet.ops.quantized import dequantize_fp8, quantize_fp8

V3 = FAMILIES[3]


def released(root: Path, kind: torch.dtype, **keys: object) -> dict[str, torch.Tensor]:
    """Write a V3 in FP8 with scales that are powers of two, and return its weights as numbers."""
    V3.model_of().save_pretrained(root)
    tensors, plain = {}, {}
    for name, tensor in load_file(root / "model.safetensors").items():
        tensors[name] = plain[name] = tensor
        if name.endswith(("proj.weight", "mqa.weight")) and "eh_proj" not in name:
            q, scale = quantize_fp8(tensor, powers=True)
            assert torch.equal(scale.log2(), scale.log2().round())
            tensors[name], tensors[f"{name}_scale_inv"] = q, scale.to(kind)
            plain[name] = dequantize_fp8(q, scale, torch.float32)
    save_file(tensors, root / "model.safetensors")
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        **keys,
    }
    (root / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.parametrize("kind", [torch.float32, torch.float8_e8m0fnu], ids=str)
def test_scales_that_are_powers_of_two_load(tmp_path: Path, kind: torch.dtype) -> None:
    plain = released(tmp_path / "fp8", kind, scale_fmt="ue8m0")
    expected = quintet.DeepseekV3ForCausalLM.from_pretrained(
        None, config=V3.config(**V3.alone), state_dict=plain
    )
    ids = torch.arange(1, 9)[None]
    model = quintet.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "fp8", dtype="float32")
    assert torch.equal(model(ids).logits, expected(ids).logits)
    wish = quintet.FineGrainedFP8Config(scale_fmt="ue8m0")
    held = quintet.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype="float32", quantization_config=wish
    )
    held.save_pretrained(tmp_path / "again")
    again = quintet.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "again", dtype="float32")
    assert torch.equal(again(ids).logits, expected(ids).logits)
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    assert settings["quantization_config"]["scale_fmt"] == "ue8m0"


def test_powers_lose_at_most_one_bit_of_range() -> None:
    weight = torch.randn(300, 200) * torch.logspace(-9, 3, 200)
    q, scale = quantize_fp8(weight, powers=True)
    _, exact = quantize_fp8(weight)
    assert bool((scale >= exact * 0.999).all() and (scale < exact * 2.001).all())
    assert bool(q.to(torch.float32).isfinite().all())
    zero, none = quantize_fp8(torch.zeros(4, 4), powers=True)
    assert torch.equal(dequantize_fp8(zero, none, torch.float32), torch.zeros(4, 4))
