"""The shapes of released models of the five families, as their config.json has them."""

from collections.abc import Mapping
from typing import Any

from quintet import AutoConfig
from quintet.configuration import PreTrainedConfig
from quintet.measurement.geometries import GEOMETRIES

__all__ = ["FP8", "RELEASED", "released"]

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def _qwen2(width: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Any:
    values = {
        "vocab_size": 152064,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
    }
    return "qwen2", {**values, **more}


_TIED = {"vocab_size": 151936, "tie_word_embeddings": True}
_V2 = {
    "vocab_size": 102400,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "topk_method": "group_limited_greedy",
    "n_group": 8,
    "topk_group": 3,
    "max_position_embeddings": 163840,
}
_MOONLIGHT = {
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 8192,
}
_QWEN2_57B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
_ZAMBA2_27 = {"n_mamba_heads": 80, "num_mem_blocks": 2}
_HERE = {
    "Zamba2-1.2B": "zamba2-1.2b",
    "Zamba2-7B": "zamba2-7b",
    "DeepSeek-V2-Lite": "deepseek-v2-lite",
    "Qwen1.5-MoE-A2.7B": "qwen1.5-moe-a2.7b",
}
_V3 = {"num_nextn_predict_layers": 1, "max_position_embeddings": 163840}
RELEASED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Qwen2-0.5B": _qwen2(896, 4864, 24, 14, 2, **_TIED),
    "Qwen2-1.5B": _qwen2(1536, 8960, 28, 12, 2, **_TIED),
    "Qwen2.5-3B": _qwen2(2048, 11008, 36, 16, 2, **_TIED),
    "Qwen2-7B": _qwen2(3584, 18944, 28, 28, 4),
    "Qwen2.5-14B": _qwen2(5120, 13824, 48, 40, 8),
    "Qwen2.5-32B": _qwen2(5120, 27648, 64, 40, 8),
    "Qwen2-72B": _qwen2(8192, 29568, 80, 64, 8),
    "Qwen1.5-0.5B": _qwen2(1024, 2816, 24, 16, 16, **_TIED),
    "Qwen1.5-1.8B": _qwen2(2048, 5504, 24, 16, 16, vocab_size=151936),
    "Qwen1.5-4B": _qwen2(2560, 6912, 40, 20, 20, vocab_size=151936),
    "Qwen1.5-7B": _qwen2(4096, 11008, 32, 32, 32, vocab_size=151936),
    "Qwen1.5-14B": _qwen2(5120, 13696, 40, 40, 40),
    "Qwen1.5-32B": _qwen2(5120, 27392, 64, 40, 8),
    "Qwen1.5-72B": _qwen2(8192, 24576, 80, 64, 64),
    "Qwen1.5-110B": _qwen2(8192, 49152, 80, 64, 8),
    # QwQ and the larger distilled ones have the shapes of Qwen2.5.
    "DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(1536, 8960, 28, 12, 2, vocab_size=151936),
    "Qwen2-57B-A14B": ("qwen2_moe", _QWEN2_57B),
    "DeepSeek-V2": ("deepseek_v2", _V2),
    # All else of a released V3 are the defaults.
    "DeepSeek-V3": ("deepseek_v3", {**_V3, "quantization_config": FP8}),
    "Moonlight-16B-A3B": ("deepseek_v3", _MOONLIGHT),
    "Zamba2-2.7B": ("zamba2", _ZAMBA2_27),
    **{
        name: (GEOMETRIES[key].model_type, dict(GEOMETRIES[key].values))
        for name, key in _HERE.items()
    },
}


def released(name: str, **changes: Any) -> PreTrainedConfig:
    """Return the configuration of a released model, with changes."""
    model_type, values = RELEASED[name]
    return AutoConfig.for_model(model_type, **{**values, **changes})
