"""Small DeepSeek models, ours and theirs, with the same random weights."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from quintet.models import deepseek_v2, deepseek_v3

__all__ = [
    "FAMILIES",
    "GROUPS",
    "MODULES",
    "V2_VARIANTS",
    "V3_VARIANTS",
    "YARN",
    "absorb",
    "config_of",
    "model_of",
    "mtp_twins",
    "randomise",
    "theirs_ahead",
    "twins",
]

COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    # Weights of the default 0.02 add too little to the residual for an error in them to be seen.
    "initializer_range": 0.15,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "DeepseekV2": COMMON,
    "DeepseekV3": {**COMMON, "n_group": 4, "topk_group": 2},
}
MODULES = {"DeepseekV2": deepseek_v2, "DeepseekV3": deepseek_v3}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
}
BOTH: dict[str, dict[str, Any]] = {
    "plain": {},
    "q-direct": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "eps": {"rms_norm_eps": 0.05},
    "yarn": {"rope_scaling": YARN},
    "yarn-mscale": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn-temperature": {"rope_scaling": {**YARN, "mscale": None, "mscale_all_dim": None}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "tied": {"tie_word_embeddings": True},
    "experts-all": {"first_k_dense_replace": 0},
    "experts-none": {"first_k_dense_replace": 3},
    "wide-values": {"v_head_dim": 32, "n_shared_experts": 2},
}
V2_VARIANTS: dict[str, dict[str, Any]] = {
    **BOTH,
    "groups": GROUPS,
    "mlp-bias": {"mlp_bias": True, "n_shared_experts": 2},
    "gelu": {"hidden_act": "gelu"},
}
V3_VARIANTS: dict[str, dict[str, Any]] = {
    **BOTH,
    "rotated-halves": {"rope_interleave": False},
    "unnormalised": {"norm_topk_prob": False},
    "one-group": {"n_group": 1, "topk_group": 1, "rope_theta": 5e4},
    "all-groups": {"n_group": 2, "topk_group": 2},
}


def randomise(model: torch.nn.Module) -> None:
    """Give norms, biases and routers values at which an error would show."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            mean = 1.0 if "norm" in name else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.3)
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
        if name.endswith(("kv_b_proj.weight", "q_proj.weight", "q_b_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.2)


def config_of(family: str, **changes: Any) -> Any:
    """Our configuration of a small model."""
    return getattr(MODULES[family], f"{family}Config")(**{**FAMILIES[family], **changes})


def model_of(family: str, head: str = "ForCausalLM", **changes: Any) -> Any:
    """A small model of ours; the same at every call."""
    torch.manual_seed(1)
    model = getattr(MODULES[family], family + head)(config_of(family, **changes)).eval()
    randomise(model)
    return model


def twins(
    family: str, head: str, changes: dict[str, Any], backend: str = "sdpa"
) -> tuple[Any, Any]:
    """A model of ours and one of Transformers with the same random weights."""
    values = {**FAMILIES[family], **changes}
    copied = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    config = getattr(transformers, f"{family}Config")(**copied)
    config._attn_implementation = "eager"
    theirs = getattr(transformers, family + head)(config).eval()
    randomise(theirs)
    ours = model_of(family, head, **changes, attn_implementation=backend)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def absorb(monkeypatch: Any, always: bool) -> None:
    """Compute attention absorbed always, or never."""

    def chosen(T: int, S: int) -> bool:
        return always

    monkeypatch.setattr("quintet.ops.mla.absorbs", chosen)


def mtp_twins(depth: int, **changes: Any) -> tuple[Any, Any, Any]:
    """Our model with prediction layers, Transformers' model, and its prediction layers."""
    values = {**FAMILIES["DeepseekV3"], **changes}
    copied = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    config = transformers.DeepseekV3Config(**copied, num_nextn_predict_layers=depth)
    config._attn_implementation = "eager"
    main = transformers.DeepseekV3ForCausalLM(config).eval()
    ahead = MtpModel(main, depth).eval()
    randomise(main)
    for parameter in ahead.layers.parameters():
        # Transformers leaves the experts of these layers as the memory they were given.
        torch.nn.init.normal_(parameter, std=0.1)
    randomise(ahead.layers)
    ours = model_of("DeepseekV3", **changes, num_nextn_predict_layers=depth)
    tensors = dict(main.state_dict())
    for k, layer in enumerate(ahead.layers):
        for name, tensor in layer.state_dict().items():
            name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            tensors[f"model.layers.{3 + k}.{name}"] = tensor
    missing, unexpected = ours.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) == set(ours.tied_names())
    return ours, main, ahead


def theirs_ahead(main: Any, ahead: Any, ids: Tensor, depth: int) -> list[Tensor]:
    """The logits of each of Transformers' prediction layers, at positions that have a token."""
    T = ids.shape[1]
    hidden = main.model(ids).last_hidden_state
    cache, made = MtpCache(config=ahead.config), []
    for k in range(1, depth + 1):
        positions = torch.arange(k, T)[None]
        hidden = ahead.forward_layer(
            k - 1, hidden[:, : T - k], positions, cache, input_ids=ids[:, k:]
        )
        made.append(main.lm_head(hidden))
    return made
