"""What a step reads and a prompt multiplies, against counts by hand."""

from typing import Any

import pytest
import torch

from quintet import AutoConfig
from quintet.measurement.floors import StepBytes, prompt_flops, step_bytes
from quintet.measurement.synthetic import filled_cache, random_model

DENSE = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# q, k and v with biases, o, the MLP, two norms.
DENSE_LAYER = (16 * 16 + 16) + 2 * (16 * 8 + 8) + 16 * 16 + 3 * 16 * 24 + 2 * 16
DENSE_PRODUCTS = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24

MIXED = DENSE | {
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 10,
}
ATTENTION = (16 * 16 + 16) + 2 * (16 * 8 + 8) + 16 * 16
EXPERT = 3 * 16 * 6
# Router, shared expert, its gate.
MIXED_REST = 8 * 16 + 3 * 16 * 10 + 16

LATENT = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "first_k_dense_replace": 1,
}
# q, down to the latent with its norm, up from it, o.
LATENT_ATTENTION = 16 * 2 * 10 + 16 * (12 + 4) + 12 + 12 * 2 * (6 + 5) + 2 * 5 * 16

HYBRID = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_attention_heads": 4,
    "n_mamba_heads": 4,
    "mamba_d_state": 8,
    "adapter_rank": 3,
}
INNER, CONV = 32, 32 + 2 * 8
# in_proj, the convolution with its bias, three scalars a head in float32, norm, out_proj; a norm.
MAMBA = 16 * (INNER + CONV + 4) + CONV * 4 + CONV + INNER + INNER * 16 + 16
SCALARS = 3 * 4
# Two norms; q, k, v of twice the width, o; gate and up, down; the adapter of one use.
BLOCK = (32 + 16) + 3 * 32 * 32 + 32 * 16 + 16 * 40 + 20 * 16 + (16 * 3 + 3 * 40)
JOIN = 16 * 16


def model_of(model_type: str, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return random_model(AutoConfig.for_model(model_type, **values), dtype)


def counted(model: Any, batch: int, depth: int) -> StepBytes:
    return step_bytes(model, filled_cache(model, batch, 1), batch, depth)


@pytest.mark.parametrize("batch", [1, 3])
def test_dense_weights_are_read_once_whatever_the_batch(batch: int) -> None:
    found = counted(model_of("qwen2", DENSE), batch, 50)
    # Frequencies of the rotation, too; the tied embedding is read as a head, and rows of it again.
    numbers = 2 * DENSE_LAYER + 16 + 100 * 16 + batch * 16 + 2
    assert found == StepBytes(4 * numbers, cache=batch * 50 * 2 * 2 * (2 * 4) * 4, states=0)


def test_half_the_bytes_in_bfloat16() -> None:
    found = counted(model_of("qwen2", DENSE, torch.bfloat16), 1, 50)
    assert found.weights == 2 * (2 * DENSE_LAYER + 16 + 100 * 16 + 16) + 4 * 2
    assert found.cache == 50 * 2 * 2 * (2 * 4) * 2


def test_a_window_bounds_what_is_read_of_the_cache() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    found = counted(model_of("qwen2", DENSE | sliding), 1, 50)
    assert found.cache == (50 + 7) * 2 * (2 * 4) * 4


@pytest.mark.parametrize(("batch", "hit"), [(1, 2.0), (2, 3.5), (64, 8.0)])
def test_of_the_experts_those_hit_on_average(batch: int, hit: float) -> None:
    found = counted(model_of("qwen2_moe", MIXED), batch, 1)
    layer = ATTENTION + 2 * 16 + MIXED_REST + hit * EXPERT
    numbers = 2 * layer + 16 + 100 * 16 + batch * 16 + 2
    assert found.weights == pytest.approx(4 * numbers, rel=1e-6)


def test_latents_are_read_once_for_all_heads() -> None:
    found = counted(model_of("deepseek_v2", LATENT), 1, 50)
    dense, mixed = 3 * 16 * 24, 4 * 16 + 2 * (3 * 16 * 6) + 3 * 16 * 6
    numbers = 2 * (LATENT_ATTENTION + 2 * 16) + dense + mixed + 16 + 100 * 16 + 16 + 2
    assert found == StepBytes(4 * numbers, cache=50 * 2 * (12 + 4) * 4, states=0)


def test_prediction_layers_are_not_read() -> None:
    groups = {"n_group": 1, "topk_group": 1}
    plain, more = (
        counted(model_of("deepseek_v3", LATENT | groups | {"num_nextn_predict_layers": n}), 1, 9)
        for n in (0, 1)
    )
    assert plain == more


def test_a_shared_block_is_read_at_each_use() -> None:
    model = model_of("zamba2", HYBRID)
    found = counted(model, 1, 50)
    numbers = 4 * (MAMBA + SCALARS) + 2 * (BLOCK + JOIN) + 16 + 100 * 16 + 16
    frequencies = model.base_model.rotary_emb.inv_freq.numel()
    assert found.weights == 4 * (numbers + frequencies)
    assert found.weights > sum(x.nbytes for x in model.parameters())
    assert found.cache == 50 * 2 * 2 * 32 * 4


def test_recurrent_states_are_read_and_written() -> None:
    found = counted(model_of("zamba2", HYBRID), 3, 50)
    assert found.states == 2 * 3 * 4 * (CONV * 3 + INNER * 8) * 4


@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_multiplies_by_each_weight_and_at_its_end_by_the_head(batch: int) -> None:
    config = AutoConfig.for_model("qwen2", **DENSE)
    assert prompt_flops(config, batch, 30) == 2 * batch * (30 * 2 * DENSE_PRODUCTS + 1600)


def test_a_prompt_multiplies_by_the_active_experts() -> None:
    config = AutoConfig.for_model("qwen2_moe", **MIXED)
    layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + MIXED_REST + 2 * EXPERT
    assert prompt_flops(config, 1, 30) == pytest.approx(2 * (30 * 2 * layer + 1600))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_weights_are_read_as_they_are_held(bits: str, tmp_path: Any) -> None:
    from quintet import AutoModelForCausalLM

    model_of("qwen2_moe", MIXED).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantize=bits)
    held = sum(x.nbytes for x in quantised.state_dict().values())
    missed = sum(
        x.nbytes * 6 / 8 for name, x in quantised.state_dict().items() if ".experts." in name
    )
    embedding = sum(x.nbytes for n, x in quantised.state_dict().items() if "embed_tokens" in n)
    expected = held - missed - embedding * 99 / 100 + 8
    assert counted(quantised, 1, 1).weights == pytest.approx(expected, abs=1)
    assert counted(quantised, 1, 1).weights < counted(plain, 1, 1).weights
