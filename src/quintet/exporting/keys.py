"""A configuration as the metadata of a GGUF file: the inverse of `quintet.gguf.config`."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quintet.configuration.base import PreTrainedConfig
from quintet.errors import UnsupportedModelError, shown
from quintet.gguf.cursor import Value
from quintet.ops.activations import activation

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "qwen2": "qwen2",
        "qwen2_moe": "qwen2moe",
        "deepseek_v2": "deepseek2",
        "deepseek_v3": "deepseek2",
    }
)
SOFTMAX, SIGMOID = 1, 2
# It tells V2-Lite from V2 by how many layers there are.
_LITE_LAYERS = (26, 27)
# What llama.cpp does otherwise, whatever the file says: the key, and what has to be.
_ACTIVATION = "silu"
_QWEN = {"hidden_act": _ACTIVATION, "use_sliding_window": False}
_DEEPSEEK = {
    "hidden_act": _ACTIVATION,
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
}
_FIXED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen2": _QWEN,
        "qwen2_moe": {
            **{**_QWEN, "norm_topk_prob": False, "tie_word_embeddings": False},
            **{"decoder_sparse_step": 1, "mlp_only_layers": []},
        },
        "deepseek_v2": _DEEPSEEK,
        "deepseek_v3": {**_DEEPSEEK, "rope_interleave": True},
    }
)


def config_metadata(config: PreTrainedConfig) -> dict[str, Value]:
    """Return the keys that describe a model.

    Raises:
        UnsupportedModelError: llama.cpp has no architecture for it, or would run another model.
    """
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF has no architecture for {config.model_type!r}; there are those of "
            f"{', '.join(ARCHITECTURES)}"
        )
    values = dict(vars(config))
    # It has several names.
    if activation(values["hidden_act"]) is activation(_ACTIVATION):
        values["hidden_act"] = _ACTIVATION
    for key, needed in _FIXED[config.model_type].items():
        if values.get(key, needed) not in (needed, None):
            raise UnsupportedModelError(
                f"{key}={shown(values[key])} cannot be said in GGUF: llama.cpp runs such a model "
                f"with {needed}, and would answer otherwise"
            )
    named: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": values["intermediate_size"],
        "attention.head_count": values["num_attention_heads"],
        "attention.layer_norm_rms_epsilon": float(values["rms_norm_eps"]),
        **_rope(config),
        **(_latent(values) if "kv_lora_rank" in values else _grouped(values)),
    }
    if config.model_type != "qwen2":
        named |= _experts(config.model_type, values)
    architecture = ARCHITECTURES[config.model_type]
    return {f"{architecture}.{k}": value for k, value in named.items() if value is not None}


def read_otherwise(config: PreTrainedConfig) -> list[str]:
    """Return one sentence per key that llama.cpp interprets differently."""
    values = vars(config)
    found = []
    if config.model_type == "deepseek_v2":
        if (
            values["topk_method"] == "group_limited_greedy"
            and values["topk_group"] < values["n_group"]
        ):
            found.append(
                "llama.cpp rates a group of experts by its best two, as V3 does, not by its best "
                "one, and chooses other experts for some tokens"
            )
        if values["q_lora_rank"] is None and values["num_hidden_layers"] not in _LITE_LAYERS:
            found.append(
                f"llama.cpp reads a model without q_lora_rank that has {_LITE_LAYERS[-1]} layers, "
                f"as V2-Lite does, and refuses one of {values['num_hidden_layers']}"
            )
    return found


def _grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    heads = values["num_attention_heads"]
    size = values.get("head_dim") or values["hidden_size"] // heads
    return {
        "attention.head_count_kv": values["num_key_value_heads"],
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
    }


def _latent(values: Mapping[str, Any]) -> dict[str, Any]:
    rank, turned = values["kv_lora_rank"], values["qk_rope_head_dim"]
    # One key of the latent's size for all heads; the sizes of a head itself are those "mla".
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": values["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": values["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "attention.q_lora_rank": values["q_lora_rank"],
        "rope.dimension_count": turned,
    }


def _experts(model_type: str, values: Mapping[str, Any]) -> dict[str, Any]:
    named = {
        "expert_used_count": values["num_experts_per_tok"],
        "expert_feed_forward_length": values["moe_intermediate_size"],
    }
    if model_type == "qwen2_moe":
        return {
            **named,
            "expert_count": values["num_experts"],
            "expert_shared_feed_forward_length": values["shared_expert_intermediate_size"],
        }
    sigmoid = model_type == "deepseek_v3"
    if not sigmoid and values["topk_method"] not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModelError(
            f"topk_method={shown(values['topk_method'])} cannot be said in GGUF"
        )
    grouped = sigmoid or values["topk_method"] != "greedy"
    return {
        **named,
        "expert_count": values["n_routed_experts"],
        "expert_shared_count": values["n_shared_experts"],
        "leading_dense_block_count": values["first_k_dense_replace"],
        "expert_weights_scale": float(values["routed_scaling_factor"]),
        "expert_weights_norm": bool(values["norm_topk_prob"]),
        "expert_gating_func": SIGMOID if sigmoid else SOFTMAX,
        "expert_group_count": values["n_group"] if grouped else None,
        "expert_group_used_count": values["topk_group"] if grouped else None,
    }


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    rope = config.rope()
    named: dict[str, Any] = {"rope.freq_base": float(rope.rope_theta)}
    if rope.rope_type == "default":
        return named
    if rope.rope_type not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"rope_type={rope.rope_type!r} cannot be said in GGUF; linear and yarn can"
        )
    named |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type == "linear":
        return named
    if rope.mscale_all_dim and rope.mscale not in (None, rope.mscale_all_dim):
        raise UnsupportedModelError(
            f"rope: mscale={rope.mscale} and mscale_all_dim={rope.mscale_all_dim} cannot be said "
            "in GGUF where they differ"
        )
    named |= {
        "rope.scaling.original_context_length": rope.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
    }
    if rope.mscale_all_dim:
        named["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.mscale_all_dim
    elif rope.attention_factor is not None:
        usual = 0.1 * math.log(rope.factor) + 1
        named["rope.scaling.yarn_attn_factor"] = rope.attention_factor / usual
    return named
