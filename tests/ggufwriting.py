"""Small models as GGUF files, written by the package of llama.cpp under the names that it has."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

__all__ = [
    "ARCHITECTURES",
    "add_tokens",
    "describe",
    "named_tensors",
    "quantised",
    "random_blocks",
    "write",
]

ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
}
# Where the blocks of a type have their numbers in half precision.
HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,)},
}


# The package names them for architectures that have them in each release.
_PREDICTION = re.compile(
    r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm|embed_tokens|shared_head\.(?:head|norm))\.weight"
)


def write(
    model: Any,
    path: Path,
    *,
    kind: Callable[[str, tuple[int, ...]], Kind] = lambda name, shape: Kind.F32,
    architecture: gguf.MODEL_ARCH | None = None,
    old_kv: bool = False,
    alignment: int = 32,
    shard_tensors: int = 0,
    more: Callable[[gguf.GGUFWriter], None] | None = None,
    without: tuple[str, ...] = (),
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> dict[str, Any]:
    """Write a model, and return the arrays that went into the file by their names there.

    `kind` says the type of each matrix; vectors are always F32. `more` adds or replaces keys,
    and `without` names keys that are left out. `change` is done to the tensors before.
    """
    arch = architecture or ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(
        path, gguf.MODEL_ARCH_NAMES[arch], split_max_tensors=shard_tensors, small_first_shard=False
    )
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    describe(writer, model.config, old_kv=old_kv)
    if more is not None:
        more(writer)
    for name in without:
        del writer.kv_data[0][f"{gguf.MODEL_ARCH_NAMES[arch]}.{name}"]
    written = {}
    for name, tensor in change(named_tensors(model, arch, old_kv=old_kv)).items():
        chosen = Kind.F32 if tensor.ndim == 1 else kind(name, tuple(tensor.shape))
        values = quantised(tensor, chosen)
        written[name] = (values, chosen)
        writer.add_tensor(name, values, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def add_tokens(writer: gguf.GGUFWriter) -> None:
    """Write a tokenizer of 101 tokens."""
    letters = [chr(33 + number) for number in range(94)]
    tokens = [*letters, '!"', *(f"<{number}>" for number in range(6))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 100 + [3])
    writer.add_token_merges(['! "'])
    writer.add_eos_token_id(100)
    writer.add_chat_template("{{ messages }}")


def quantised(tensor: Tensor, kind: Kind) -> Any:
    """An array of a type; what the package cannot make is random blocks."""
    values = tensor.detach().to(torch.float32).contiguous().numpy()
    if kind.name.endswith("_K") or kind.name.startswith("IQ"):
        weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
        count = values.size // weights
        blocks = random_blocks(kind.name, count, seed=values.size)
        return blocks.reshape(*values.shape[:-1], values.shape[-1] // weights * nbytes)
    return gguf.quantize(values, kind)


def random_blocks(kind: str, count: int, seed: int = 0, scales: Any = None) -> Any:
    """Random bytes whose scales are small, or those given: valid blocks of any type."""
    random = np.random.default_rng(seed)
    _, nbytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    blocks = random.integers(0, 256, (count, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = random.choice([-1.0, 1.0], count) * random.uniform(1e-4, 4e-4, count)
        chosen = halves if scales is None else random.choice(scales, count)
        blocks[:, at : at + 2] = chosen.astype(np.float16)[:, None].view(np.uint8)
    return blocks


def named_tensors(
    model: Any, arch: gguf.MODEL_ARCH, *, old_kv: bool = False, within: str = ""
) -> dict[str, Tensor]:
    """The tensors of a model as the converter of llama.cpp names and shapes them.

    `within` is a part of the names of those that are wanted.
    """
    config = model.config
    predicted = vars(config).get("num_nextn_predict_layers", 0)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers + predicted)
    state = {k: v.detach() for k, v in model.state_dict().items() if within in k}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*experts)\.(gate_up|down)_proj", name):
            halves = {"down_proj": tensor}
            if match[2] == "gate_up":
                gate, up = tensor.chunk(2, dim=1)
                halves = {"gate_proj": gate, "up_proj": up}
            found |= {f"{match[1]}.{part}.weight": half for part, half in halves.items()}
        elif name.endswith("kv_b_proj.weight") and not old_kv:
            maps = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, values = maps.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            found[name.replace("kv_b_proj", "k_b_proj")] = keys.transpose(1, 2)
            found[name.replace("kv_b_proj", "v_b_proj")] = values
        elif name.endswith("shared_expert_gate.weight"):
            found[name] = tensor.flatten()
        elif arch == gguf.MODEL_ARCH.LLAMA and re.search(r"\.[qk]_proj\.", name):
            key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            rows = torch.unflatten(tensor, 0, (getattr(config, key), 2, -1))
            found[name] = rows.transpose(1, 2).reshape(tensor.shape)
        else:
            found[name] = tensor
    if arch == gguf.MODEL_ARCH.LLAMA:
        found = {name: value for name, value in found.items() if not name.endswith("_proj.bias")}
    found = {
        f"{name.removesuffix('_correction_bias')}_correction.bias"
        if name.endswith("e_score_correction_bias")
        else name: value
        for name, value in found.items()
    }
    renamed = {}
    for name, value in found.items():
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if there is None and (match := _PREDICTION.fullmatch(name)):
            there = (
                f"blk.{match[1]}.nextn.{match[2].replace('shared_head.', 'shared_head_')}.weight"
            )
        assert there is not None, name
        renamed[there] = value
    return renamed


def describe(writer: Any, config: Any, *, old_kv: bool = False) -> None:
    """Write the keys that the converter of llama.cpp writes for a config."""
    predicted = vars(config).get("num_nextn_predict_layers", 0)
    writer.add_block_count(config.num_hidden_layers + predicted)
    if predicted:
        writer.add_nextn_predict_layers(predicted)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope().rope_theta)
    writer.add_vocab_size(config.vocab_size)
    _describe_rope(writer, config.to_dict().get("rope_scaling"))
    if config.model_type.startswith("qwen2"):
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        if config.model_type == "qwen2_moe":
            writer.add_expert_count(config.num_experts)
            writer.add_expert_used_count(config.num_experts_per_tok)
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
        return
    size = config.qk_nope_head_dim + config.qk_rope_head_dim
    if old_kv:
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_key_length(size)
        writer.add_value_length(config.v_head_dim)
    else:
        writer.add_head_count_kv(1)
        writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
        writer.add_value_length(config.kv_lora_rank)
        writer.add_key_length_mla(size)
        writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    kinds = gguf.ExpertGatingFuncType
    sigmoid = config.model_type == "deepseek_v3"
    writer.add_expert_gating_func(kinds.SIGMOID if sigmoid else kinds.SOFTMAX)
    if sigmoid or config.topk_method != "greedy":
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _describe_rope(writer: Any, scaling: Mapping[str, Any] | None) -> None:
    if not scaling or scaling["rope_type"] == "default":
        return
    kinds = gguf.RopeScalingType
    writer.add_rope_scaling_type(kinds.YARN if scaling["rope_type"] == "yarn" else kinds.LINEAR)
    writer.add_rope_scaling_factor(scaling["factor"])
    if (length := scaling.get("original_max_position_embeddings")) is not None:
        writer.add_rope_scaling_orig_ctx_len(length)
    if (log := scaling.get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * log)
