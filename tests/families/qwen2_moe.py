"""Small Qwen2-MoE models, ours and Transformers' with the same weights."""

from typing import Any

import torch
import transformers

from quintet.models import qwen2_moe
from quintet.models.qwen2_moe import Qwen2MoeConfig

__all__ = [
    "SLIDING",
    "SMALL",
    "VARIANTS",
    "model_of",
    "randomise",
    "small_config",
    "their_config",
    "twins",
]

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Weights of the default 0.02 add too little to the residual for an error in them to be seen.
    "initializer_range": 0.15,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "router_aux_loss_coef": 0.1,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "no-bias": {"qkv_bias": False},
    "tied": {"tie_word_embeddings": True},
    "normalised": {"norm_topk_prob": True, "num_experts_per_tok": 3},
    "one-expert": {"num_experts_per_tok": 1},
    "all-experts": {"num_experts_per_tok": 6},
    "every-second": {"decoder_sparse_step": 2},
    "some-dense": {"mlp_only_layers": [0, 2]},
    "dense": {"num_experts": 0},
    "sliding": SLIDING,
    "types": {**SLIDING, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
    "gelu": {"hidden_act": "gelu"},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
}


def small_config(**changes: Any) -> Qwen2MoeConfig:
    """A Qwen2-MoE small enough to run in milliseconds."""
    return Qwen2MoeConfig(**{**SMALL, **changes})


def their_config(changes: dict[str, Any]) -> Any:
    """The same of Transformers; which layers slide is said, its own default is another."""
    values = {**SMALL, **changes, "layer_types": small_config(**changes).layer_types}
    copied = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
    config = transformers.Qwen2MoeConfig(**copied)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def randomise(model: torch.nn.Module) -> None:
    """Draw norms, biases, routers and experts anew: at their initial values errors hide."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
        elif "expert" in name or name.endswith(".gate.weight"):
            torch.nn.init.normal_(parameter, std=0.3)


def model_of(name: str = "Qwen2MoeForCausalLM", **changes: Any) -> Any:
    """A model of ours with random weights, the same at every call."""
    torch.manual_seed(1)
    model = getattr(qwen2_moe, name)(small_config(**changes)).eval()
    randomise(model)
    return model


def twins(name: str, changes: dict[str, Any], backend: str = "sdpa") -> tuple[Any, Any]:
    """A model of ours and one of Transformers, of the class `name`, with the same weights."""
    theirs = getattr(transformers, name)(their_config(changes)).eval()
    randomise(theirs)
    config = small_config(**changes, attn_implementation=backend)
    ours = getattr(qwen2_moe, name)(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
