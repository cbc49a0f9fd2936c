"""Every branch of a small Qwen2."""

from typing import Any

import torch

__all__ = ["LLAMA3", "SLIDING", "VARIANTS", "randomise"]

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MSCALE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "beta_fast": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "sliding": SLIDING,
    "sliding-all": {**SLIDING, "sliding_window": 3, "max_window_layers": 0},
    "gelu": {"hidden_act": "gelu"},
    "theta": {"rope_theta": 1e6},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 12,
    },
    "yarn": {"rope_scaling": YARN},
    "yarn-mscale": {"rope_scaling": MSCALE},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn-sliding": {"rope_scaling": YARN, **SLIDING},
}


def randomise(model: torch.nn.Module) -> None:
    """Draw norms and biases anew: at their initial ones and zeros errors hide."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
