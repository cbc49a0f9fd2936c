"""The models whose training is measured, each small enough for this to be a matter of minutes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

__all__ = ["MODELS", "directory"]


def _qwen2() -> Any:
    from quintet import Qwen2Config

    return Qwen2Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=9,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def _zamba2() -> Any:
    from quintet import Zamba2Config

    return Zamba2Config(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=24,
        layers_block_type=["hybrid" if i % 6 == 5 else "mamba" for i in range(24)],
        num_attention_heads=8,
        num_key_value_heads=8,
        mamba_d_state=64,
        mamba_ngroups=1,
        n_mamba_heads=12,
        num_mem_blocks=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def _qwen2_moe() -> Any:
    from quintet import Qwen2MoeConfig

    return Qwen2MoeConfig(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=96,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


def _v3() -> Any:
    from quintet import AutoConfig

    # The demo's own, without the prediction layer, which Transformers leaves out.
    demo = Path(__file__).parents[1] / "src" / "quintet" / "demo"
    return AutoConfig.from_pretrained(
        demo, num_nextn_predict_layers=0, max_position_embeddings=4096, dtype="float32"
    )


def _v2() -> Any:
    from quintet import DeepseekV2Config

    return DeepseekV2Config(
        vocab_size=2048,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        moe_intermediate_size=96,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        topk_method="greedy",
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


MODELS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "qwen2-30m": _qwen2,
        "qwen2-moe": _qwen2_moe,
        "deepseek-v2": _v2,
        "deepseek-v3": _v3,
        "zamba2-30m": _zamba2,
    }
)


def directory(folder: Path, name: str) -> Path:
    """Return where a model's random weights lie in float32, writing them if they are not there."""
    import torch

    from quintet import AutoModelForCausalLM

    path = folder / f"training-{name}"
    if not (path / "config.json").is_file():
        print(f"writing {path}", flush=True)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(MODELS[name](), dtype="float32").save_pretrained(path)
    return path
