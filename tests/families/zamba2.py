"""Small Zamba2 models, alone and beside Transformers'."""

from typing import Any

import torch
import transformers

from quintet.models import zamba2
from quintet.models.zamba2 import Zamba2Config, Zamba2ForCausalLM

__all__ = ["SHAPES", "SMALL", "model_of", "randomised", "small_config", "twins"]

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "num_attention_heads": 4,
    "n_mamba_heads": 8,
    "mamba_d_state": 8,
    "adapter_rank": 3,
    "max_position_embeddings": 128,
    # Transformers clamps step sizes in a prompt and not when decoding: so small, nowhere.
    "time_step_min": 1e-7,
    "chunk_size": 8,
}
TWO_BLOCKS = {
    "num_hidden_layers": 6,
    "layers_block_type": ["hybrid", "mamba", "hybrid", "hybrid", "mamba", "hybrid"],
    "num_mem_blocks": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapters": {"use_shared_attention_adapter": True},
    "rope": {"use_mem_rope": True},
    "groups": {"mamba_ngroups": 2, "mamba_d_conv": 3},
    "gqa": {"num_key_value_heads": 2},
    "7b": {
        **TWO_BLOCKS,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
        "mamba_ngroups": 2,
    },
    "2.7b": TWO_BLOCKS,
    "bias": {"add_bias_linear": True},
    # Without tied embeddings Transformers does not share blocks either: one for each layer.
    "untied": {"tie_word_embeddings": False, "num_mem_blocks": 2, "hidden_act": "silu"},
}


def small_config(**changes: Any) -> Zamba2Config:
    """A Zamba2 small enough to run in milliseconds."""
    return Zamba2Config(**{**SMALL, **changes})


def randomised(model: Any) -> Any:
    """Give norms, biases and the scalars of state spaces values that would show an error."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.uniform_(parameter, -2.0, 2.0)
        elif name.endswith("dt_bias"):
            torch.nn.init.uniform_(parameter, -3.0, 1.0)
        elif parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
        else:
            # The initial 0.02 makes what a layer adds too small to be seen beside the residual.
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def model_of(**changes: Any) -> Zamba2ForCausalLM:
    """A language model of ours with random weights, the same for the same changes."""
    torch.manual_seed(1)
    made: Zamba2ForCausalLM = randomised(Zamba2ForCausalLM(small_config(**changes)).eval())
    return made


def twins(name: str, changes: dict[str, Any], backend: str = "sdpa") -> tuple[Any, Any]:
    """A model of ours and one of Transformers, of the class `name`, with the same weights."""
    values = {**SMALL, **changes}
    config = transformers.Zamba2Config(
        **{k: list(v) if isinstance(v, list) else v for k, v in values.items()}
    )
    config._attn_implementation = "eager"
    theirs = randomised(getattr(transformers, name)(config).eval())
    ours = getattr(zamba2, name)(small_config(**changes, attn_implementation=backend)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs
