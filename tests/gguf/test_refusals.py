"""What a file says that no model here can be, is refused by its name before any data is read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import ggufwriting
from conformance.families import FAMILIES
from quintet import AutoConfig, AutoModelForCausalLM
from quintet.errors import CheckpointError, QuintetError, UnsupportedModelError

QWEN2, MOE, V2, V3 = FAMILIES[0], *(f for f in FAMILIES[1:] if f.name != "zamba2")
LLAMA = gguf.MODEL_ARCH.LLAMA
More = Callable[[gguf.GGUFWriter], None]


def refusal(path: Path, error: type[QuintetError] = UnsupportedModelError) -> str:
    with pytest.raises(error) as found:
        AutoModelForCausalLM.from_pretrained(path)
    assert str(path) in str(found.value)
    assert len(str(found.value).splitlines()) <= 15
    return str(found.value)


def write(path: Path, more: More | None = None, family: Any = QWEN2, **how: Any) -> Path:
    ggufwriting.write(family.model_of(), path, more=more, **how)
    return path


KEYS: dict[str, tuple[More, str]] = {
    "sliding": (lambda w: w.add_sliding_window(64), "llama.attention.sliding_window=64"),
    "scores": (lambda w: w.add_attention_scale(0.5), "llama.attention.scale=0.5"),
    "logits": (lambda w: w.add_logit_scale(0.1), "llama.logit_scale"),
    "capped": (lambda w: w.add_attn_logit_softcapping(50.0), "softcapping=50.0"),
    "both ways": (lambda w: w.add_causal_attention(False), "attention.causal=False"),
    "experts": (lambda w: w.add_expert_count(8), "llama.expert_count=8"),
    "half turned": (lambda w: w.add_rope_dimension_count(8), "llama.rope.dimension_count=8"),
    "other values": (lambda w: w.add_value_length(8), "llama.attention.value_length=8"),
    "long": (
        lambda w: (
            w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            w.add_rope_scaling_factor(4.0),
        )[0],
        "'longrope'",
    ),
}


@pytest.mark.parametrize("key", KEYS)
def test_what_a_qwen2_cannot_say_is_named(key: str, tmp_path: Path) -> None:
    more, said = KEYS[key]
    path = write(tmp_path / "m.gguf", more, architecture=LLAMA)
    assert said in refusal(path, QuintetError)


@pytest.mark.parametrize("name", ["gemma3", "qwen2vl", "deepseek", "qwen3", "mamba2"])
def test_other_architectures_are_named_with_those_there_are(name: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", name)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = refusal(tmp_path / "m.gguf")
    assert f"'{name}'" in said
    assert "qwen2, qwen2moe, deepseek2, llama" in said


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", lambda w: w.add_type("mmproj"))
    assert "general.type='mmproj'" in refusal(path)


def test_types_that_are_not_read_are_named_with_their_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    source = QWEN2.model_of(hidden_size=64)
    ggufwriting.write(source, path, kind=lambda n, s: Kind.MXFP4 if "ffn_up" in n else Kind.F32)
    said = refusal(path)
    assert "blk.0.ffn_up.weight: MXFP4" in said
    assert "Q4_K" in said


def odd_tensor(name: str, *shape: int) -> More:
    return lambda writer: writer.add_tensor(name, np.ones(shape, np.float32))


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_q_norm.weight", "blk.0.ffn_up.scale", "v.blk.0.attn_q.weight", "blk.0.odd.weight"],
)
def test_a_tensor_without_a_place_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", odd_tensor(name, 16))
    said = refusal(path, CheckpointError)
    assert f"{name}: F32 [16]" in said


def test_a_bias_that_no_qwen2_has_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", odd_tensor("blk.0.ffn_up.bias", 48), architecture=LLAMA)
    assert "blk.0.ffn_up.bias: F32 [48]" in refusal(path, CheckpointError)


@pytest.mark.parametrize(
    "name", ["blk.3.attn_norm.weight", "blk.0.attn_q_a.weight", "blk.0.ffn_gate_inp.weight"]
)
def test_a_tensor_of_another_architecture_or_layer_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", odd_tensor(name, 4, 16))
    assert f"{name}: F32 [4, 16]" in refusal(path, CheckpointError)


def test_a_tensor_that_is_there_whole_and_as_a_part_is_named(tmp_path: Path) -> None:
    config = QWEN2.model_of().config
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    more = odd_tensor("blk.0.attn_qkv.weight", rows, config.hidden_size)
    said = refusal(write(tmp_path / "m.gguf", more), CheckpointError)
    assert "model.layers.0.self_attn.q_proj.weight" in said


def test_missing_and_misshaped_tensors_are_listed(tmp_path: Path) -> None:
    def shrink(writer: Any) -> None:
        writer.add_feed_forward_length(128)

    said = refusal(write(tmp_path / "m.gguf", shrink), CheckpointError)
    assert "9 of another shape" in said
    assert "model.layers.0.mlp.up_proj.weight: expected [128, " in said

    def longer(writer: Any) -> None:
        writer.add_block_count(4)

    said = refusal(write(tmp_path / "n.gguf", longer), CheckpointError)
    assert "12 missing" in said
    assert "model.layers.3.mlp." in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (lambda w: w.add_vocab_size(100), "vocab_size=100 has to be 101"),
        (lambda w: w.add_block_count(0), "block_count=0"),
        (lambda w: w.add_block_count(2**32 - 1), "block_count=4294967295"),
        (lambda w: w.add_head_count(0), "num_attention_heads=0"),
        (lambda w: w.add_head_count_kv(3), "num_key_value_heads=3"),
        (lambda w: w.add_string("qwen2.context_length", "long"), "context_length='long'"),
        (lambda w: w.add_bool("qwen2.context_length", True), "context_length=True"),
        (lambda w: w.add_array("qwen2.attention.head_count_kv", [1, 2, 2]), "2 values for 3"),
        (lambda w: w.add_layer_norm_rms_eps(float("nan")), "rms_norm_eps"),
        (lambda w: w.add_rope_freq_base(-1.0), "rope_theta"),
        (lambda w: w.add_token_list([str(n) for n in range(102)]), "102 tokens"),
    ],
)
def test_metadata_that_breaks_a_rule_is_named(more: More, said: str, tmp_path: Path) -> None:
    def replacing(writer: Any) -> None:
        known = dict(writer.kv_data[0])
        writer.kv_data[0].clear()
        more(writer)
        writer.kv_data[0].update({k: v for k, v in known.items() if k not in writer.kv_data[0]})

    path = write(tmp_path / "m.gguf", replacing)
    with pytest.raises(QuintetError, match=re.escape(said)):
        AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("key", ["embedding_length", "block_count", "context_length"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", without=(key,))
    assert f"has no qwen2.{key}" in refusal(path, CheckpointError)


def test_one_value_a_layer_is_one_where_all_are_equal(tmp_path: Path) -> None:
    def listed(writer: Any) -> None:
        del writer.kv_data[0]["qwen2.attention.head_count_kv"]
        writer.add_head_count_kv([2, 2, 2])

    path = write(tmp_path / "m.gguf", listed)
    assert AutoConfig.from_pretrained(path).num_key_value_heads == 2


def test_halves_of_another_map_are_named(tmp_path: Path) -> None:
    def swapped(writer: Any) -> None:
        # As many numbers in all, parted otherwise.
        writer.kv_data[0]["deepseek2.attention.key_length_mla"].value += 4
        writer.kv_data[0]["deepseek2.attention.value_length_mla"].value -= 4

    path = write(tmp_path / "m.gguf", swapped, family=V3)
    said = refusal(path, CheckpointError)
    assert "attn_k_b.weight has the shape [4, 24, 16]" in said
    assert "[4, 24, 20]" in said


# -- what older and newer files do not say ---------------------------------------------------------


def test_older_files_of_deepseek_leave_their_routing_out(tmp_path: Path) -> None:
    def silent(writer: Any) -> None:
        for key in ("expert_gating_func", "expert_group_count", "expert_group_used_count"):
            del writer.kv_data[0][f"deepseek2.{key}"]

    config = AutoConfig.from_pretrained(write(tmp_path / "m.gguf", silent, family=V3))
    # The bias that corrects scores is V3's alone.
    assert config.model_type == "deepseek_v3"
    assert (config.n_group, config.topk_group) == (1, 1)


def test_older_files_of_qwen2_moe_leave_their_widths_out(tmp_path: Path) -> None:
    source = MOE.model_of(intermediate_size=64, shared_expert_intermediate_size=64)
    active = source.config.num_experts_per_tok
    source = MOE.model_of(
        intermediate_size=64,
        shared_expert_intermediate_size=64,
        moe_intermediate_size=64 // active,
    )
    keys = ("expert_feed_forward_length", "expert_shared_feed_forward_length")
    ggufwriting.write(source, tmp_path / "m.gguf", without=keys)
    found = AutoConfig.from_pretrained(tmp_path / "m.gguf")
    assert found.moe_intermediate_size == 64 // active
    assert found.shared_expert_intermediate_size == 64


def llama3_factors(size: int, factor: float) -> Any:
    """As the converter of llama.cpp makes them."""
    theta, old, low, high = 10_000.0, 8192, 1.0, 4.0
    factors = []
    for frequency in 1 / theta ** (np.arange(0, size, 2) / size):
        length = 2 * np.pi / frequency
        smooth = (old / length - low) / (high - low)
        if length < old / high:
            factors.append(1.0)
        elif length > old / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def without_biases(**changes: Any) -> Any:
    model = QWEN2.model_of(**changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.bias"):
                weight.zero_()
    return model


def test_the_frequencies_of_llama_3_are_known(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = without_biases(head_dim=32, rope_scaling=scaling)

    def more(writer: Any) -> None:
        for key in [key for key in writer.kv_data[0] if ".rope.scaling." in key]:
            del writer.kv_data[0][key]
        writer.add_tensor("rope_freqs.weight", llama3_factors(32, 8.0))

    ggufwriting.write(source, tmp_path / "m.gguf", architecture=LLAMA, more=more)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert found.config.rope_parameters["rope_type"] == "llama3"
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(found(ids).logits, source(ids).logits)


@pytest.mark.parametrize(
    ("place", "value", "theta"),
    [(3, 1.5, None), (0, 0.0, None), (15, float("inf"), None), (3, 8.0, 0.0), (3, 8.0, -1.0)],
)
def test_other_frequencies_are_refused(
    place: int, value: float, theta: float | None, tmp_path: Path
) -> None:
    odd = llama3_factors(32, 8.0)
    odd[place] = value

    def more(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", odd)
        if theta is not None:
            del writer.kv_data[0]["llama.rope.freq_base"]
            writer.add_rope_freq_base(theta)

    path = tmp_path / "m.gguf"
    ggufwriting.write(without_biases(head_dim=32), path, architecture=LLAMA, more=more)
    assert "rope_freqs.weight" in refusal(path, QuintetError)


@pytest.mark.parametrize("factor", [-2.0, float("nan"), float("inf")])
def test_a_factor_that_cannot_be_is_named(factor: float, tmp_path: Path) -> None:
    def more(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_float32("qwen2.rope.scaling.yarn_attn_factor", 0.5)

    said = refusal(write(tmp_path / "m.gguf", more), CheckpointError)
    assert f"rope.scaling.factor={factor}" in said
