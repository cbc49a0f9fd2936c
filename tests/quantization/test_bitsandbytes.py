"""The formats of bitsandbytes, beside the package itself and the files that Transformers writes."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import quintet
from quintet.errors import CheckpointError
from quintet.ops.codebook import TABLES, dequantize_codes, dynamic_table, nest, quantize_codes
from quintet.quantization import QuantizedLinear
from support import SMALL

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as theirs

# bitsandbytes 0.50.2 reads rows on a CPU wrongly unless 64 divides them.
CONFIG = {**SMALL, "hidden_size": 128, "intermediate_size": 192}
SHAPES = [(64, 128), (33, 7), (300, 1000)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_those_of_the_package(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.1).to(dtype)
    packed, absmax = quantize_codes(weight, kind, 64)
    expected, state = theirs.quantize_4bit(weight, quant_type=kind)
    assert torch.equal(torch.tensor(TABLES[kind]), state.code)
    assert torch.equal(packed, expected)
    assert torch.equal(absmax, state.absmax)
    back = dequantize_codes(packed, absmax, shape, kind, 64, torch.float32)
    low, high = (expected >> 4).view(-1).long(), (expected & 15).view(-1).long()
    indices = torch.stack((low, high), dim=-1).view(-1)[: weight.numel()]
    scales = absmax.repeat_interleave(64)[: weight.numel()]
    assert torch.equal(back, (state.code[indices] * scales).view(shape))


def test_scales_in_8_bits_are_those_of_the_package() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 1000)
    _, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    _, absmax = quantize_codes(weight, "nf4", 64)
    nested = nest(absmax)
    assert torch.equal(dynamic_table(torch.device("cpu")), state.state2.code)
    torch.testing.assert_close(nested.offset[0], state.offset, rtol=1e-6, atol=0)
    # A mean of another order of summation moves what lies between two codes.
    far = (nested.codes.int() - state.absmax.int()).abs()
    assert int(far.max()) <= 1
    assert float(far.float().mean()) < 0.01
    torch.testing.assert_close(nested.expand(), absmax, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
        },
    ],
    ids=["int8", "fp4", "nf4-nested"],
)
# What the peer and its parts have to say while they load is not ours to judge.
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_ours_and_we_read_theirs(
    options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**CONFIG)
    plain, quantised, again = (tmp_path / name for name in ("plain", "quantised", "again"))
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(plain)
    their_config = transformers.BitsAndBytesConfig(**options)
    peer = transformers.Qwen2ForCausalLM.from_pretrained(plain, quantization_config=their_config)
    peer.save_pretrained(quantised)

    model = quintet.Qwen2ForCausalLM.from_pretrained(quantised)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert isinstance(model.lm_head, torch.nn.Linear)
    model.save_pretrained(again)
    before, after = (load_file(root / "model.safetensors") for root in (quantised, again))
    # A byte that says how a GPU has its rows in order, which is in their order on disk.
    kept = {name for name in before if not name.endswith("weight_format")}
    assert kept == after.keys()
    for name in kept:
        if "quant_state" in name:
            assert json.loads(bytes(before[name].tolist())) == json.loads(
                bytes(after[name].tolist())
            )
        else:
            torch.testing.assert_close(before[name], after[name], rtol=1e-6, atol=0)

    ids = torch.arange(1, 23).view(2, 11)
    back = transformers.Qwen2ForCausalLM.from_pretrained(again)
    with torch.no_grad():
        expected, found = peer(ids).logits.float(), model(ids).logits.float()
        assert torch.equal(back(ids).logits.float(), expected)
    # LLM.int8 rounds activations to 8 bits there, and FP4 and NF4 compute in float32.
    difference = (found - expected).norm() / expected.norm()
    assert float(difference) < (0.08 if "load_in_8bit" in options else 0.04)

    ours = quintet.Qwen2ForCausalLM.from_pretrained(
        plain, quantization_config=quintet.BitsAndBytesConfig(**options)
    )
    for name, tensor in ours.state_dict().items():
        assert_equal_but_for_ties(tensor, model.state_dict()[name])


def assert_equal_but_for_ties(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Codes may be neighbours where the last bit of a quotient or mean decides."""
    if ours.is_floating_point():
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        return
    far = (ours.int() - theirs.int()).abs()
    assert int(far.max()) <= 1
    assert float(far.float().mean()) < 0.01


def test_a_state_that_is_not_of_its_weight_is_refused(tmp_path: Path) -> None:
    model = quintet.Qwen2ForCausalLM(quintet.Qwen2Config(**CONFIG))
    model.save_pretrained(tmp_path)
    config = quintet.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load = quintet.Qwen2ForCausalLM.from_pretrained
    load(tmp_path, quantization_config=config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = "model.layers.1.mlp.up_proj.weight"
    state = f"{weight}.quant_state.bitsandbytes__nf4"
    for key, bad, said in [
        (state, b'{"quant_type": "nf4", "blocksize": 64, "shape": [1, 2]}', r"shape=\[1, 2\]"),
        (state, b"nonsense", "not JSON"),
        (state, b"[]", "JSON object"),
        (state, b"[" * 9_000 + b"]" * 1_000, "not JSON"),
        (state, b" " * 10_001, "10,001 bytes, more than 10,000"),
    ]:
        changed = {**tensors, key: torch.tensor(list(bad), dtype=torch.uint8)}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{weight}: .*{said}"):
            load(tmp_path)
    changed = {**tensors, f"{weight}.quant_map": torch.zeros(16)}
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="quant_map is not the table of nf4"):
        load(tmp_path)
