"""The keys of Zamba2's config: the page's defaults, published files, both vintages, errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from families.zamba2 import model_of, small_config
from quintet.errors import ConfigError
from quintet.models.zamba2 import Zamba2Config, Zamba2ForCausalLM
from support import relative_error

# The defaults of the documentation page; None is filled in from others.
PAGE: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "hidden_size": 2560,
    "num_hidden_layers": 54,
    "mamba_d_state": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_ngroups": 1,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "time_step_limit": None,
    "n_mamba_heads": 8,
    "use_conv_bias": True,
    "chunk_size": 256,
    "use_mem_eff_path": False,
    "add_bias_linear": False,
    "hidden_act": "gelu",
    "num_attention_heads": 32,
    "attention_dropout": 0.0,
    "num_mem_blocks": 1,
    "use_shared_attention_adapter": False,
    "adapter_rank": 128,
    "use_mem_rope": False,
    "rope_theta": 10000,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "use_cache": True,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_long_context": False,
}


def layers(count: int, hybrids: list[int]) -> list[str]:
    return ["hybrid" if i in hybrids else "mamba" for i in range(count)]


PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "1.2B": (
        {
            "hidden_size": 2048,
            "num_hidden_layers": 38,
            "layers_block_type": layers(38, [5, 11, 17, 23, 29, 35]),
            "hybrid_layer_ids": [5, 11, 17, 23, 29, 35],
            "mamba_d_state": 128,
            "n_mamba_heads": 64,
            "mamba_headdim": 64,
            "attention_head_dim": 128,
            "attention_hidden_size": 4096,
            "num_attention_heads": 32,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "use_shared_attention_adapter": True,
        },
        1.2,
    ),
    "2.7B": (
        {
            "hidden_size": 2560,
            "num_hidden_layers": 54,
            "mamba_d_state": 64,
            "n_mamba_heads": 80,
            "num_mem_blocks": 2,
        },
        2.7,
    ),
    "7B": (
        {
            "hidden_size": 3584,
            "num_hidden_layers": 81,
            "layers_block_type": layers(81, [*range(11, 78, 6), 6]),
            "mamba_d_state": 64,
            "n_mamba_heads": 112,
            "mamba_ngroups": 2,
            "num_mem_blocks": 2,
            "use_mem_rope": True,
            "use_shared_attention_adapter": True,
        },
        7.4,
    ),
}


def test_defaults_are_those_of_the_page() -> None:
    config = Zamba2Config()
    assert {key: getattr(config, key) for key in PAGE} == PAGE
    assert config.intermediate_size == 4 * 2560
    assert config.num_key_value_heads == 32
    assert config.hybrid_layer_ids == [6, 12, 18, 24, 30, 36, 42, 47, 51]
    theirs = transformers.Zamba2Config()
    assert config.hybrid_layer_ids == theirs.hybrid_layer_ids
    for key in ("attention_hidden_size", "attention_head_dim", "head_dim", "mamba_headdim"):
        assert getattr(config, key) == getattr(theirs, key)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_construct(name: str) -> None:
    values, billions = PUBLISHED[name]
    with torch.device("meta"):
        model = Zamba2ForCausalLM(Zamba2Config.from_dict(values))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=0.06)
    assert model.config.mamba_headdim == 64


def test_both_vintages_of_names_are_one() -> None:
    kinds = ["linear_attention", "hybrid", "mamba"]
    config = Zamba2Config(num_hidden_layers=3, layers_block_type=kinds)
    assert config.layers_block_type == config.layer_types == ["mamba", "hybrid", "mamba"]
    other = Zamba2Config(num_hidden_layers=3, layer_types=kinds, rope_parameters={"rope_theta": 5})
    assert other.layers_block_type == config.layers_block_type
    assert other.rope_theta == 5
    fewer = Zamba2Config.from_dict(
        {"layers_block_type": kinds, "num_hidden_layers": 3}, num_hidden_layers=2
    )
    assert fewer.layers_block_type == ["mamba", "hybrid"]


def test_files_are_read_by_both_sides(tmp_path: Path) -> None:
    config = small_config(time_step_limit=(0.1, 0.5), use_mem_rope=True, use_long_context=True)
    config.save_pretrained(tmp_path)
    read = Zamba2Config.from_pretrained(tmp_path)
    assert read.to_json_string() == config.to_json_string()
    assert read.time_step_limit == [0.1, 0.5]
    theirs = transformers.Zamba2Config.from_pretrained(tmp_path)
    assert theirs.hybrid_layer_ids == config.hybrid_layer_ids
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta == 10000
    theirs.save_pretrained(tmp_path)
    back = Zamba2Config.from_pretrained(tmp_path)
    assert back.layers_block_type == config.layers_block_type
    assert back.rope() == config.rope()


@torch.no_grad()
def test_a_long_context_rescales_the_base() -> None:
    """theta · 8^(D / (D - 2)), D the size of a head; Transformers 5 forgets to."""
    plain = small_config(use_mem_rope=True)
    longer = small_config(use_mem_rope=True, use_long_context=True)
    D = longer.head_dim
    assert longer.max_position_embeddings == 16384
    assert longer.rope_theta == plain.rope_theta
    assert longer.rope().rope_theta == pytest.approx(1e4 * 8 ** (D / (D - 2)))
    assert small_config(use_long_context=True).rope().rope_theta == 1e4
    model = model_of(use_mem_rope=True, use_long_context=True)
    i = torch.arange(0, D, 2)
    expected = 1.0 / (1e4 * 8 ** (D / (D - 2))) ** (i / D)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    same = model_of(use_mem_rope=True, rope_theta=1e4 * 8 ** (D / (D - 2)))
    ids = torch.randint(101, (1, 30))
    assert relative_error(model(ids).logits, same(ids).logits) < 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"num_attention_heads": 5}, ["num_attention_heads=5", "64"], id="heads"),
        pytest.param({"num_key_value_heads": 3}, ["num_key_value_heads=3"], id="kv-heads"),
        pytest.param({"n_mamba_heads": 7}, ["n_mamba_heads=7", "64"], id="mamba-heads"),
        pytest.param({"mamba_ngroups": 3}, ["mamba_ngroups=3", "8"], id="groups"),
        pytest.param({"layers_block_type": ["mamba"]}, ["num_hidden_layers=4"], id="types"),
        pytest.param({"layers_block_type": ["mamba"] * 3 + ["attn"]}, ["attn"], id="type"),
        pytest.param({"time_step_limit": (0.5, 0.1)}, ["time_step_limit"], id="limit"),
        pytest.param({"time_step_limit": ("a", 1)}, ["time_step_limit"], id="limit-type"),
        pytest.param({"time_step_min": 0.2}, ["time_step_min=0.2", "0.1"], id="steps"),
        pytest.param({"mamba_headdim": 9}, ["mamba_headdim=9", "make it 8"], id="follows"),
        pytest.param({"hidden_act": "gleu"}, ["gleu", "gelu"], id="activation"),
        pytest.param(
            {"num_hidden_layers": 60, "layers_block_type": None}, ["at most 54"], id="pattern"
        ),
        pytest.param(
            {"layers_block_type": ["m", "g", "m", "g"]}, ["first format", "'hybrid'"], id="m-g"
        ),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config(**changes)
    for word in words:
        assert word in str(caught.value)


def test_configs_in_the_authors_first_format_say_what_to_do(tmp_path: Path) -> None:
    old = {"model_type": "zamba2", "state_size": 64, "conv_dimension": 4, "lora_rank": 128}
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(ConfigError, match=r"first format .*state_size.*later revision"):
        Zamba2Config.from_pretrained(tmp_path)
