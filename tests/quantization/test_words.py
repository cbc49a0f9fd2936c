"""What is written as compressed-tensors: the same numbers, to the package and to ourselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conformance.families import FAMILIES, Family
from quintet import AutoModelForCausalLM
from quintet.conversion import convert
from quintet.errors import InputError, UnsupportedModelError
from quintet.quantization import Int4Config, Int8Config, PackedConfig, Quantized

IDS = torch.arange(1, 23).view(2, 11)
# Rows of whole groups of 64.
SIZES: dict[str, dict[str, int]] = {
    "qwen2": {"intermediate_size": 128},
    "qwen2-moe": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "deepseek-v3": {
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "q_lora_rank": 64,
        "v_head_dim": 16,
    },
}
each = pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in SIZES], ids=repr)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


def decompressed(root: Path) -> dict[str, Tensor]:
    """The weights as the package reads them, which goes by the settings alone."""
    pytest.importorskip("loguru", reason="compressed-tensors cannot be imported without it")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    values = json.loads((root / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(values)
    tensors, compressor = {}, BaseCompressor.get_value_from_registry(config.format)
    found = load_file(root / "model.safetensors")
    for name in [n for n in found if n.endswith("_packed")]:
        path = name.removesuffix(".weight_packed")
        fitting = [g for g in config.config_groups.values() if path in g.targets]
        (scheme, *_) = [*fitting, config.config_groups["group_0"]]
        assert path not in config.ignore
        of_path = {n: t for n, t in found.items() if n.rpartition(".")[0] == path}
        state = {n.removeprefix(f"{path}."): t for n, t in of_path.items()}
        tensors[f"{path}.weight"] = compressor.decompress(state, scheme)["weight"]
    # What is a linear map there and not packed is ignored by name.
    for name, tensor in found.items():
        if tensor.ndim == 2 and tensor.is_floating_point() and name.endswith(".weight"):
            assert "embed" in name or name.removesuffix(".weight") in config.ignore
    return tensors


@pytest.mark.parametrize("bits", [4, 8])
@each
def test_the_package_and_we_read_the_same_numbers(
    family: Family, bits: int, tmp_path: Path
) -> None:
    family.model_of(**SIZES[family.name]).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "words", quantization_config=PackedConfig(bits=bits))
    # The same by way of our own format, whose head is in 8 bits.
    own = Int4Config(group_size=64) if bits == 4 else Int8Config()
    convert(tmp_path / "plain", tmp_path / "ours", quantization_config=own)
    convert(tmp_path / "ours", tmp_path / "again", quantization_config=PackedConfig())
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("words", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one if "head" not in n)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "words", dtype="float32")
    held = {p: m for p, m in model.named_modules() if isinstance(m, Quantized)}
    assert {f.name for m in held.values() for f in m.formats.values()} == {f"int{bits}"}
    ours = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="float32", quantize="none"
    ).state_dict()
    theirs = decompressed(tmp_path / "words")
    assert theirs
    for name, weight in theirs.items():
        if name in ours:
            # It multiplies in the dtype of the scales.
            assert torch.equal(weight, ours[name].to(weight.dtype))


def test_groups_of_two_kinds_are_named(tmp_path: Path) -> None:
    FAMILIES[0].model_of(**SIZES["qwen2"]).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    mixed = Recipe(modules_to_not_convert=["up_proj"])
    convert(tmp_path / "plain", tmp_path / "words", quantization_config=mixed)
    settings = json.loads((tmp_path / "words" / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_1"]["targets"] == [
        f"model.layers.{i}.mlp.down_proj" for i in range(3)
    ]
    assert "model.layers.0.mlp.up_proj" in settings["ignore"]
    assert len(decompressed(tmp_path / "words")) == 3 * 6
    AutoModelForCausalLM.from_pretrained(tmp_path / "words")


class Recipe(PackedConfig):
    """Down maps in 8 bits, others in 4."""

    def scheme_of(self, held: Any) -> Any:
        from quintet.quantization import Int4Format, Int8Format, Scheme
        from quintet.quantization.words import WordsFormat

        four, eight = WordsFormat(Int4Format()), WordsFormat(Int8Format())
        return Scheme(
            four, None, tuple(self.modules_to_not_convert or ()), None, {"down_proj": eight}
        )


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    family = FAMILIES[0]
    family.model_of().save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="not in integers yet"):
        convert(tmp_path / "plain", tmp_path / "out", quantization_config=PackedConfig())
    with pytest.raises(InputError, match="rows of 96 numbers"):
        convert(tmp_path / "plain", tmp_path / "out", quantization_config=PackedConfig(bits=4))
    convert(tmp_path / "plain", tmp_path / "nf4", quantize="nf4")
    with pytest.raises(UnsupportedModelError, match="is held as bitsandbytes"):
        convert(tmp_path / "nf4", tmp_path / "out", quantization_config=PackedConfig())
    assert not (tmp_path / "out").exists()
