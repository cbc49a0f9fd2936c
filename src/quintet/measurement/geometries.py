"""The shapes of released models, to be measured with random weights where no checkpoint is.

Those that do not fit a small machine are cut to fewer layers, and say so in their names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quintet.auto import AutoConfig
from quintet.configuration import PreTrainedConfig
from quintet.errors import InputError


@dataclass(frozen=True, slots=True)
class Geometry:
    """A family and the keys of its configuration."""

    model_type: str
    values: Mapping[str, Any]

    def config(self) -> PreTrainedConfig:
        """Return the configuration."""
        return AutoConfig.for_model(self.model_type, **self.values)


_V2_LITE_CUT = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 163840,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}
_V2_LITE = {**_V2_LITE_CUT, "num_hidden_layers": 27}
_HYBRIDS = (5, 11, 17, 23, 29, 35)
_HYBRIDS_7B = (6, *range(11, 78, 6))

GEOMETRIES: Mapping[str, Geometry] = MappingProxyType(
    {
        "qwen2-0.5b": Geometry(
            "qwen2",
            {
                "vocab_size": 151936,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "max_position_embeddings": 131072,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": True,
            },
        ),
        "qwen2-7b": Geometry(
            "qwen2",
            {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "max_position_embeddings": 131072,
                "rope_theta": 1000000.0,
            },
        ),
        "deepseek-v2-lite": Geometry("deepseek_v2", _V2_LITE),
        "deepseek-v2-lite-6l": Geometry("deepseek_v2", _V2_LITE_CUT),
        # What llama.cpp can read: it knows the layout without a rank of 26 or 27 layers only.
        "deepseek-v2-lite-6l-q1536": Geometry("deepseek_v2", {**_V2_LITE_CUT, "q_lora_rank": 1536}),
        "qwen1.5-moe-a2.7b-6l": Geometry(
            "qwen2_moe",
            {
                "num_hidden_layers": 6,
                "max_position_embeddings": 32768,
                "rope_theta": 1000000.0,
                "max_window_layers": 21,
            },
        ),
        "qwen1.5-moe-a2.7b": Geometry(
            "qwen2_moe",
            {
                "max_position_embeddings": 8192,
                "rope_theta": 1000000.0,
                "max_window_layers": 21,
            },
        ),
        "zamba2-7b": Geometry(
            "zamba2",
            {
                "hidden_size": 3584,
                "num_hidden_layers": 81,
                "layers_block_type": ["hybrid" if i in _HYBRIDS_7B else "mamba" for i in range(81)],
                "mamba_d_state": 64,
                "n_mamba_heads": 112,
                "mamba_ngroups": 2,
                "num_attention_heads": 32,
                "num_mem_blocks": 2,
                "use_mem_rope": True,
            },
        ),
        "zamba2-1.2b": Geometry(
            "zamba2",
            {
                "hidden_size": 2048,
                "num_hidden_layers": 38,
                "layers_block_type": ["hybrid" if i in _HYBRIDS else "mamba" for i in range(38)],
                "mamba_d_state": 128,
                "n_mamba_heads": 64,
                "num_attention_heads": 32,
                "num_mem_blocks": 1,
                "use_mem_rope": True,
                "use_shared_attention_adapter": True,
            },
        ),
        "deepseek-v3-2l-64e": Geometry(
            "deepseek_v3",
            {
                "num_hidden_layers": 2,
                "first_k_dense_replace": 1,
                "n_routed_experts": 64,
                "max_position_embeddings": 163840,
                "rope_theta": 10000.0,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 40.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 4096,
                },
            },
        ),
    }
)


def geometry(name: str) -> Geometry:
    """Return the geometry of a name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in GEOMETRIES:
        raise InputError(f"there is no geometry {name!r}; there are {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]
