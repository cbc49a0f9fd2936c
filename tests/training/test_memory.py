"""What a training needs, beside what autograd really keeps."""

from typing import Any

import pytest
import torch

from quintet import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)
from quintet.training.memory import memory

SHAPES = {"vocab_size": 100, "hidden_size": 128, "num_attention_heads": 4}
DENSE: dict[str, Any] = {**SHAPES, "intermediate_size": 344, "num_key_value_heads": 2}
MODELS: dict[str, Any] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DENSE, num_hidden_layers=3)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SHAPES,
            **{"intermediate_size": 256, "moe_intermediate_size": 64, "n_routed_experts": 8},
            **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_hidden_layers": 3},
            **{"first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 48},
            **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24},
        )
    ),
    "zamba2": lambda: Zamba2ForCausalLM(
        Zamba2Config(
            **SHAPES,
            **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
            **{"mamba_d_state": 16, "n_mamba_heads": 8, "intermediate_size": 256},
            **{"chunk_size": 64, "adapter_rank": 16},
        )
    ),
}


def kept(model: Any, ids: torch.Tensor) -> int:
    """The bytes that autograd keeps of a forward beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train().base_model(ids, use_cache=False)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_about_what_autograd_keeps(
    name: str, kernels: bool, fresh: pytest.MonkeyPatch
) -> None:
    if not kernels:
        fresh.setenv("QUINTET_KERNELS", "0")
    model = MODELS[name]()
    ids = torch.randint(100, (2, 128), generator=torch.Generator().manual_seed(0))
    found = memory(model, ids.numel(), 0)
    assert found.activations == pytest.approx(kept(model, ids), rel=0.3)
    assert memory(model, ids.numel(), 0, recompute=1).activations < 0.6 * found.activations
    half = memory(model, ids.numel(), 0, dtype=torch.bfloat16)
    assert 0.5 * found.activations < half.activations < 0.6 * found.activations


def test_weights_and_gradients_of_what_is_trained() -> None:
    with torch.device("meta"):
        model = MODELS["qwen2"]()
    size = 4 * model.num_parameters()
    found = memory(model, 10, 2 * size)
    assert (found.weights, found.gradients, found.optimizer) == (
        size + sum(b.nbytes for b in model.buffers()),
        size,
        2 * size,
    )
    assert found.total == found.weights + 3 * size + found.activations
    model.requires_grad_(False)
    assert memory(model, 10, 0).gradients == 0
