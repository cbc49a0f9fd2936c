"""Models whose file has blocks: what they are held as, in how much memory, and how near that is."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

import ggufwriting
from conformance.families import FAMILIES
from forking import Forks
from quintet import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from quintet.checkpoint import GGUFCheckpoint, open_weights
from quintet.conversion import convert
from quintet.errors import CheckpointError, InputError
from quintet.gguf import read_gguf
from quintet.gguf.layouts import LAYOUTS
from quintet.quantization import Quantized

IDS = torch.arange(24).view(2, 12)
WIDE: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 64, "intermediate_size": 256},
    "qwen2-moe": {"hidden_size": 64, "moe_intermediate_size": 32},
    "deepseek-v2": {"hidden_size": 64, "kv_lora_rank": 32, "q_lora_rank": 32},
    "deepseek-v3": {"hidden_size": 64, "kv_lora_rank": 32, "moe_intermediate_size": 32},
}


def mixed(name: str, shape: tuple[int, ...]) -> Kind:
    """As files mix them: what no block fits is in 16 bits, and routers stay float32."""
    if name.endswith("_inp.weight"):
        return Kind.F32
    if shape[-1] % 256 == 0:
        return Kind.Q6_K if "0" in name else Kind.Q4_K
    if shape[-1] % 32 == 0:
        return (Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.IQ4_NL)[len(name) % 4]
    return Kind.F16 if "down" in name else Kind.BF16


def numbers(written: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the package of llama.cpp says the tensors of a file are."""
    return {name: torch.from_numpy(dequantize(*one)) for name, one in written.items()}


@pytest.mark.parametrize(
    ("family", "old_kv"),
    [
        (one, old)
        for one in FAMILIES
        for old in (False, True)
        if one.name in WIDE and (not old or "deepseek" in one.name)
    ],
    ids=str,
)
def test_numbers_are_those_that_the_file_has(family: Any, old_kv: bool, tmp_path: Path) -> None:
    source = family.model_of(**WIDE[family.name])
    written = ggufwriting.write(source, tmp_path / "m.gguf", kind=mixed, old_kv=old_kv)
    assert {kind for _, kind in written.values()} >= {Kind.F32, Kind.Q8_0, Kind.Q4_0}

    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m.gguf", quantize="none", dtype=torch.float32
    )

    arch = ggufwriting.ARCHITECTURES[source.config.model_type]
    made = ggufwriting.named_tensors(found, arch, old_kv=old_kv)
    for name, expected in numbers(written).items():
        assert torch.equal(made[name].reshape(expected.shape), expected), name


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.name in WIDE], ids=str)
def test_blocks_are_held_exactly(family: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    ggufwriting.write(family.model_of(**WIDE[family.name]), path, kind=mixed)

    held = AutoModelForCausalLM.from_pretrained(path)
    plain = AutoModelForCausalLM.from_pretrained(path, quantize="none", dtype=torch.float32)

    assert held.dtype == torch.bfloat16
    quantised = [module for module in held.modules() if isinstance(module, Quantized)]
    assert quantised
    for path_of, module in held.named_modules():
        if not isinstance(module, Quantized):
            continue
        for name in module.matrices:
            exact = plain.get_parameter(f"{path_of}.{name}").detach()
            assert torch.equal(module.decoded(name, torch.float32), exact), path_of
    tokens = held.generate(IDS, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert tokens.shape == (2, 16)


def test_what_was_done_is_told(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "m.gguf"
    source = FAMILIES[0].model_of(hidden_size=64, num_hidden_layers=1)
    ggufwriting.write(source, path, kind=lambda name, shape: Kind.Q4_0)
    with caplog.at_level(logging.INFO, "quintet"):
        AutoModelForCausalLM.from_pretrained(path)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == f"{path}: 9 Q4_0 as int4 by 32, 6 float32 as bfloat16"
    assert not recwarn.list


def test_a_wish_is_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    ggufwriting.write(
        FAMILIES[0].model_of(hidden_size=64), path, kind=lambda name, shape: Kind.Q8_0
    )
    for wish in ("int8", "int4", "nf4"):
        model = AutoModelForCausalLM.from_pretrained(path, quantize=wish)
        assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), Quantized)
    half = AutoModelForCausalLM.from_pretrained(path, quantize="none", torch_dtype="float16")
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}


def test_what_was_loaded_can_be_saved_and_converted(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    ggufwriting.write(FAMILIES[1].model_of(**WIDE["qwen2-moe"]), path, kind=mixed)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        expected = model(IDS).logits
        model.save_pretrained(tmp_path / "saved")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(saved(IDS).logits, expected)
        with pytest.warns(UserWarning, match="no tokenizer is written"):
            done = convert(path, tmp_path / "converted")
        assert done.read >= sum(t.nbytes for t in open_weights(path).tensors.values())
        assert not done.left_out
        converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
        assert torch.equal(converted(IDS).logits, expected)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quintet"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("quantize", [None, "none"])
def test_a_scale_that_is_not_finite_is_named(
    value: float, quantize: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    ggufwriting.write(
        FAMILIES[0].model_of(hidden_size=64), path, kind=lambda name, shape: Kind.Q8_0
    )
    checkpoint = GGUFCheckpoint.open(path)
    info = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    half = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    content = bytearray(path.read_bytes())
    content[info.start + 34 : info.start + 36] = bytes(half.tolist())
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj.*Q8_0.*not finite"):
        AutoModelForCausalLM.from_pretrained(path, quantize=quantize)


def test_every_kind_that_is_read_is_one_of_the_package() -> None:
    assert set(LAYOUTS) <= set(Kind.__members__)


def test_a_variant_of_a_file_is_refused(tmp_path: Path) -> None:
    ggufwriting.write(FAMILIES[0].model_of(), tmp_path / "m.gguf")
    with pytest.raises(InputError, match="variant='fp16'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf", variant="fp16")


# -- memory ----------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
import torch
from quintet import AutoModelForCausalLM
from quintet.kernels.native import native

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
torch.ones(64, 64).bfloat16().float().div(3).round().to(torch.int8)
AutoModelForCausalLM.from_pretrained(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
print(sum(t.nbytes for t in model.state_dict().values()), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
def test_loading_holds_the_result_and_a_tensor(tmp_path: Path, forks: Forks) -> None:
    config = Qwen2Config(
        vocab_size=24_000,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    small = FAMILIES[0].model_of(hidden_size=64)
    for name, model in {"large": Qwen2ForCausalLM(config), "small": small}.items():
        ggufwriting.write(model, tmp_path / f"{name}.gguf", kind=lambda name, shape: Kind.Q8_0)
    files = [tmp_path / f"{name}.gguf" for name in ("small", "large")]
    done = forks.run(PROGRAM, *files, environment=os.environ)
    assert done.returncode == 0, done.stderr
    held, most = map(int, done.stdout.split())
    # The embedding is 26 MB in the file, and would be 98 MB as numbers.
    assert most <= held + 26e6 + 60e6


# -- a real file -----------------------------------------------------------------------------------


def test_a_real_file_says_what_its_release_says(smollm2: Path) -> None:
    config = AutoConfig.from_pretrained(smollm2)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen2", 576, 30)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert (config.rope_theta, config.rms_norm_eps) == (100_000.0, 1e-5)
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_the_weights_of_a_real_file_are_those_of_the_package(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantize="none", dtype="float32")
    made = ggufwriting.named_tensors(model, gguf.MODEL_ARCH.LLAMA, within="layers.17.")
    file = read_gguf(smollm2)
    assert len(made) == sum(name.startswith("blk.17.") for name in file.tensors) == 9
    raw = np.memmap(smollm2, np.uint8, "r")
    for name, tensor in made.items():
        info = file.tensors[name]
        kind = Kind[info.type.name]
        data = np.array(raw[info.start : info.start + info.nbytes]).reshape(info.shape[0], -1)
        expected = torch.from_numpy(dequantize(data, kind))
        assert torch.equal(tensor, expected.view(tensor.shape)), name
