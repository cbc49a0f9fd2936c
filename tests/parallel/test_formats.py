"""Files in fewer bits, of ours and of others, that several processes load."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

import ggufwriting
from packers import awq, gptq, packed_checkpoint
from parallel.cases import loading
from parallel.cases.tensor import family
from parallel.pool import Pool
from quintet.conversion import convert
from quintet.quantization import PackedConfig

NESTED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NESTED |= {"bnb_4bit_use_double_quant": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def save_in(path: Path, name: str, **options: Any) -> None:
    """Save a model in fewer bits by one process."""
    model = family(name).model_of(**loading.WIDE[name])
    model.save_pretrained(path / "plain")
    type(model).from_pretrained(path / "plain", **options).save_pretrained(path / "source")


@pytest.mark.parametrize(
    ("name", "options", "degrees"),
    [
        ("qwen2", {"quantize": "int8"}, {"tp": 2}),
        ("qwen2-moe", {"quantize": "int4"}, {"tp": 2}),
        ("qwen2", {"quantize": "nf4"}, {"tp": 2}),
        ("qwen2-moe", {"quantization_config": NESTED}, {"tp": 2, "ep": 2}),
        ("qwen2", loading.KINDS["llm.int8"], {"tp": 2}),
        ("zamba2", {"quantize": "int8"}, {"tp": 2}),
    ],
)
def test_our_files_are_cut_as_they_are(
    name: str, options: dict[str, Any], degrees: dict[str, int], tmp_path: Path, two: Pool
) -> None:
    save_in(tmp_path, name, **options)
    two.run(loading.quantised, name, tmp_path / "source", degrees, {})


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen2-moe"])
def test_fp8_stays_what_it_is_or_becomes_numbers(name: str, tmp_path: Path, two: Pool) -> None:
    save_in(tmp_path, name, quantize="fp8", dtype="bfloat16")
    degrees, source = {"tp": 2, "ep": 2}, tmp_path / "source"
    kept = {"quantization_config": {"quant_method": "fp8"}}
    two.run(loading.quantised, name, source, degrees, {**kept, "dtype": "float32"})
    two.run(loading.plain, name, source, degrees, {"dtype": "float32"})
    two.run(loading.quantised, name, source, degrees, {"quantize": "int8", "dtype": "float32"})


@pytest.mark.parametrize(
    ("pack", "settings"),
    [
        (gptq, GPTQ),
        (partial(gptq, symmetric=False, group=32), {**GPTQ, "sym": False, "group_size": 32}),
        (partial(gptq, bits=8, group=-1), {**GPTQ, "bits": 8, "group_size": -1}),
        (awq, AWQ),
    ],
    ids=["gptq", "gptq-asymmetric", "gptq-8", "awq"],
)
def test_files_of_others_are_held_as_one_process_holds_them(
    pack: Callable[[Tensor], Any], settings: dict[str, Any], tmp_path: Path, two: Pool
) -> None:
    wide = loading.WIDE["qwen2"]
    packed_checkpoint(
        family("qwen2"), tmp_path, lambda path, weight: pack(weight), settings, **wide
    )
    two.run(loading.quantised, "qwen2", tmp_path, {"tp": 2}, {})


def test_columns_in_an_order_of_their_own_are_refused_or_become_numbers(
    tmp_path: Path, two: Pool
) -> None:
    settings = {**GPTQ, "desc_act": True}
    packed_checkpoint(
        family("qwen2"),
        tmp_path,
        lambda path, weight: gptq(weight, shuffled=True),
        settings,
        **loading.WIDE["qwen2"],
    )
    said = two.run(loading.refused, "qwen2", tmp_path, {"tp": 2}, {})
    assert said[0] == said[1]
    assert "self_attn.o_proj.weight [128, 128] is held in int4, ordered" in said[0]
    assert "tp may be 1, or quantize='none'" in said[0]
    two.run(loading.plain, "qwen2", tmp_path, {"tp": 2}, {"quantize": "none"})


def test_a_block_that_would_be_cut_is_refused_with_what_would_do(tmp_path: Path, two: Pool) -> None:
    wide = {**loading.WIDE["qwen2"], "intermediate_size": 192}
    family("qwen2").model_of(**wide).save_pretrained(tmp_path)
    said = two.run(loading.refused, "qwen2", tmp_path, {"tp": 2}, {"quantize": "int4"})
    assert said[0] == said[1]
    assert "down_proj.weight [128, 192] is held in int4 by 32 with offsets, whose" in said[0]
    assert "tp=2 would cut; tp may be 1, 3, or quantize='none'" in said[0]


def test_words_of_compressed_tensors(tmp_path: Path, two: Pool) -> None:
    family("qwen2").model_of(**loading.WIDE["qwen2"]).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "source", quantization_config=PackedConfig(bits=4))
    two.run(loading.quantised, "qwen2", tmp_path / "source", {"tp": 2}, {})


def kind(name: str, shape: tuple[int, ...]) -> Kind:
    """Blocks of 32 and of 256, also of the vectors of ids."""
    if "inp" in name or shape[-1] % 32:
        return Kind.F32
    chosen: Kind = (Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.IQ4_NL)[len(name) % 4]
    return chosen


@pytest.mark.parametrize(
    ("name", "degrees"), [("qwen2", {"tp": 2}), ("deepseek-v3", {"tp": 2, "ep": 2})]
)
def test_blocks_of_gguf(name: str, degrees: dict[str, int], tmp_path: Path, two: Pool) -> None:
    wide = {**loading.WIDE[name], **({} if name == "qwen2" else {"kv_lora_rank": 32})}
    ggufwriting.write(family(name).model_of(**wide), tmp_path / "m.gguf", kind=kind)
    options = {"dtype": torch.float32}
    two.run(loading.quantised, name, tmp_path / "m.gguf", degrees, options)
    two.run(loading.plain, name, tmp_path / "m.gguf", degrees, {**options, "quantize": "none"})
