"""The FP8 checkpoints of DeepSeek-V3 and R1: names and blocks as released, 576 rows included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import (
    Fp8Dequantize,
    FP8Linear,
    Fp8Quantize,
    replace_with_fp8_linear,
)
from transformers.utils.quantization_config import FineGrainedFP8Config as TheirConfig

import packers
import quintet
from conformance.families import FAMILIES
from families import deepseek
from quintet import DeepseekV3ForCausalLM
from quintet.conversion import convert
from quintet.errors import CheckpointError
from quintet.quantization import FineGrainedFP8Config, QuantizedExperts, QuantizedLinear

IDS = torch.arange(1, 23).view(2, 11)
# kv_a_proj_with_mqa has 512 + 64 rows, of which no multiple of 128 is; experts of 96 rows.
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "moe_intermediate_size": 96,
    "num_nextn_predict_layers": 1,
}
# As released.
CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def by_hand(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale block by block, without a thought for speed."""
    rows, columns = weight.shape
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = weight[block].float().abs().max() / 448
            q[block] = (weight[block].float() / scales[i, j]).to(q.dtype)
    return q, scales


def meant(q: Tensor, scales: Tensor) -> Tensor:
    """The formula: every number times the scale of its block, rounded to bfloat16 once."""
    result = torch.empty(q.shape, dtype=torch.bfloat16)
    for i in range(q.shape[0]):
        along = scales[i // 128].repeat_interleave(128)[: q.shape[1]]
        result[i] = (q[i].float() * along).bfloat16()
    return result


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint with the names of a release, and the weights it stands for."""
    root = tmp_path_factory.mktemp("released")
    torch.manual_seed(4)
    model = DeepseekV3ForCausalLM(deepseek.config_of("DeepseekV3", **SIZES)).to(torch.bfloat16)
    deepseek.randomise(model)
    model.save_pretrained(root)
    tensors = load_file(root / "model.safetensors")
    means = dict(tensors)
    plain = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "norm.weight")
    for name, weight in list(tensors.items()):
        if weight.ndim == 2 and not name.endswith(plain):
            q, scales = by_hand(weight)
            tensors |= {name: q, f"{name}_scale_inv": scales}
            means[name] = meant(q, scales)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return root, means


def test_all_weights_come_out_as_the_formula_says_to_the_bit(
    released: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    root, means = released
    assert means["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape[0] == 576
    model = quintet.AutoModelForCausalLM.from_pretrained(root)
    assert model.dtype == torch.bfloat16
    assert "quantization_config" not in vars(model.config)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == means.keys()
    assert all(torch.equal(found[name], means[name]) for name in means)
    # The layer of multi-token prediction is among them.
    assert "model.layers.3.mlp.experts.0.up_proj.weight" in found


def test_it_stays_in_fp8_where_that_is_asked_for(
    released: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    root, _ = released
    plain = DeepseekV3ForCausalLM.from_pretrained(root, dtype="float32")
    model = DeepseekV3ForCausalLM.from_pretrained(root, quantize="fp8", dtype="float32")
    behind = model.model.prediction_layers()[0]
    assert isinstance(behind.mlp.experts, QuantizedExperts)
    assert isinstance(behind.eh_proj, QuantizedLinear)
    assert behind.mlp.experts.gate_up_proj.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        one = model(IDS, output_mtp_logits=True)
        other = plain(IDS, output_mtp_logits=True)
    # The very same weights.
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.mtp_logits, other.mtp_logits, rtol=1e-4, atol=1e-4)
    model = DeepseekV3ForCausalLM.from_pretrained(root, quantize="fp8")
    # What was not rounded again is on disk as it was; kv_b_proj is kept as plain numbers.
    model.save_pretrained(tmp_path)
    before, after = (load_file(r / "model.safetensors") for r in (root, tmp_path))
    assert before.keys() - after.keys() == {
        f"model.layers.{i}.self_attn.kv_b_proj.weight_scale_inv" for i in range(4)
    }
    same = [name for name in after if before[name].dtype == after[name].dtype]
    assert all(torch.equal(before[n].float(), after[n].float()) for n in same)
    assert len(after) - len(same) == 4


def test_it_is_quantised_again_without_a_detour(released: tuple[Path, dict[str, Tensor]]) -> None:
    root, means = released
    model = DeepseekV3ForCausalLM.from_pretrained(root, quantize="int8")
    stack = model.model.layers[2].mlp.experts.decoded("gate_up_proj", torch.float32)
    weights = [
        torch.cat(
            [means[f"model.layers.2.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up")]
        ).float()
        for e in range(len(stack))
    ]
    for found, weight in zip(stack, weights, strict=True):
        # Half a step of int8, and the rounding to bfloat16 that was left out.
        most = weight.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-8)
        assert bool(((found - weight).abs() <= most).all())


def test_stacked_experts_are_read_with_their_scales(
    released: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    root, _ = released
    tensors = load_file(root / "model.safetensors")
    prefix = "model.layers.2.mlp.experts"
    means = []
    for stacked, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        both: list[tuple[Tensor, Tensor]] = []
        for e in range(deepseek.config_of("DeepseekV3").n_routed_experts):
            names = [f"{prefix}.{e}.{part}_proj.weight" for part in parts]
            # One grid over gate and up together: a block has rows of both.
            both.append(by_hand(torch.cat([tensors[n].float() for n in names])))
            for name in names:
                del tensors[name], tensors[f"{name}_scale_inv"]
        tensors[f"{prefix}.{stacked}"] = torch.stack([q for q, _ in both])
        tensors[f"{prefix}.{stacked}_scale_inv"] = torch.stack([s for _, s in both])
        means.append(torch.stack([meant(*one) for one in both]))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((root / "config.json").read_text())
    experts = DeepseekV3ForCausalLM.from_pretrained(tmp_path).model.layers[2].mlp.experts
    assert torch.equal(experts.gate_up_proj, means[0])
    assert torch.equal(experts.down_proj, means[1])
    held = DeepseekV3ForCausalLM.from_pretrained(tmp_path, quantize="int8").model.layers[2].mlp
    found = held.experts.decoded("gate_up_proj", torch.float32)
    most = means[0].float().abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-8)
    assert bool(((found - means[0].float()).abs() <= most).all())


def test_scales_that_are_missing_are_named(
    released: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    root, _ = released
    tensors = load_file(root / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    scale = tensors.pop(name)
    (tmp_path / "config.json").write_text((root / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}: expected \[5, 2\]"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    wrong = {**tensors, name: scale[:4]}
    save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}: expected \[5, 2\], found \[4, 2\]"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)


def test_blocks_that_divide_are_those_of_transformers() -> None:
    class Quantizer:
        quantization_config = TheirConfig(weight_block_size=(128, 128))

    weight = torch.randn(3, 256, 384)
    ours = FineGrainedFP8Config().scheme()
    assert ours is not None
    theirs = Fp8Quantize(Quantizer())._quantize_one("a.weight", weight)
    # They read what we write, and we what they write.
    encoded = ours.weights.encode(weight)
    shape, scale = tuple(weight.shape), "a.weight_scale_inv"
    read = Fp8Dequantize(Quantizer())._dequantize_one(
        encoded[""], encoded["_scale_inv"], torch.bfloat16
    )
    assert torch.equal(read, ours.weights.decode(encoded, shape, torch.bfloat16))
    parts = {"": theirs["a.weight"], "_scale_inv": theirs[scale]}
    read = Fp8Dequantize(Quantizer())._dequantize_one(parts[""], theirs[scale], torch.bfloat16)
    assert torch.equal(read, ours.weights.decode(parts, shape, torch.bfloat16))
    # They multiply by the inverse of a scale, we divide: its last bit differs.
    torch.testing.assert_close(encoded["_scale_inv"], theirs[scale], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [False, True], ids=["matrix", "row"])
def test_a_scale_may_be_of_a_whole_matrix_or_row(
    rows: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def pack(path: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        largest = weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()
        scale = largest.float() / 448
        q = (weight.float() / scale).to(torch.float8_e4m3fn)
        tensors = {"weight": q, "weight_scale": scale, "input_scale": torch.ones(())}
        return tensors, q.float() * scale

    settings = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    plain = packers.packed_checkpoint(FAMILIES[0], tmp_path, pack, settings)
    model = quintet.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in vars(model.config)
    # Written again, it is what it was: here nothing is multiplied.
    convert(tmp_path, tmp_path / "again")
    again = quintet.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)
    held = load_file(tmp_path / "again" / "model.safetensors")
    assert held["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert not recwarn.list


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen2-moe"])
def test_what_stays_numbers_is_what_transformers_leaves(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    family.model_of().save_pretrained(tmp_path / "plain")
    held = quintet.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantize="fp8")
    held.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "plain", tmp_path / "converted", quantize="fp8")
    for folder in (tmp_path / "saved", tmp_path / "converted"):
        tensors = load_file(folder / "model.safetensors")
        scaled = {key.removesuffix(".weight_scale_inv") for key in tensors if "scale_inv" in key}
        config = transformers.AutoConfig.from_pretrained(folder)
        settings = TheirConfig(**config.quantization_config)
        with torch.device("meta"):
            peer = transformers.AutoModelForCausalLM.from_config(config)
        replace_with_fp8_linear(peer, settings.modules_to_not_convert, settings, pre_quantized=True)
        theirs = {path for path, module in peer.named_modules() if isinstance(module, FP8Linear)}
        assert theirs == {path for path in scaled if ".experts." not in path}
