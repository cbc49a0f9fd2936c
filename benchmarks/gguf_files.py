"""Our checkpoints as llama.cpp's files, with the same weights; its own quantiser makes the rest."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from quintet.auto import AutoConfig

__all__ = ["convert"]

ARCHITECTURES = {
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
# What llama.cpp calls what each layer may have.
PLAIN = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# These stay in float32 there.
EXACT = ("norm.weight", ".bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def convert(checkpoint: Path, target: Path, weights: str) -> Path:
    """Return the file of a checkpoint in BF16, Q8_0 or Q4_0, writing it if it is not there."""
    if target.is_file():
        return target
    # A file is there whole or not at all.
    scratch = target.with_suffix(".part")
    if weights == "BF16":
        print(f"writing {target}", flush=True)
        _write(checkpoint, scratch)
    else:
        source = convert(checkpoint, target.parent / f"{checkpoint.name}-BF16.gguf", "BF16")
        print(f"writing {target}", flush=True)
        _quantise(source, scratch, weights)
    scratch.rename(target)
    return target


def _write(checkpoint: Path, target: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    writer = gguf.GGUFWriter(target, ARCHITECTURES[config.model_type])
    _describe(writer, config)
    with ExitStack() as stack:
        opened = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in sorted(checkpoint.glob("*.safetensors"))
        ]
        read = {name: file.get_tensor for file in opened for name in file.keys()}  # noqa: SIM118
        tensors = dict(_tensors(config, read))
        for name, make in tensors.items():
            array, kind = _stored(name, make())
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, make in tensors.items():
            writer.write_tensor_data(_stored(name, make())[0])
    writer.close()


def _describe(writer: Any, config: Any) -> None:
    """Write the keys that llama.cpp needs; it is told of no vocabulary but its size."""
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope().rope_theta)
    if config.model_type == "qwen2":
        writer.add_head_count_kv(config.num_key_value_heads)
    elif config.model_type == "qwen2_moe":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    else:
        _describe_latent(writer, config)


def _describe_latent(writer: Any, config: Any) -> None:
    rank, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    # One key of the latent's size for all heads; the sizes of a head itself are those "mla".
    writer.add_head_count_kv(1)
    writer.add_key_length(rank + rotated)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rotated)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(rotated)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(rank)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    sigmoid = config.model_type == "deepseek_v3"
    kinds = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(kinds.SIGMOID if sigmoid else kinds.SOFTMAX)
    if sigmoid:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    yarn = config.to_dict().get("rope_scaling")
    if yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn["factor"])
        writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn["mscale_all_dim"])


def _tensors(
    config: Any, read: dict[str, Callable[[str], Tensor]]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield each of llama.cpp's tensors, and how it is made of those of the checkpoint."""
    for name, there in OUTSIDE.items():
        if name in read:
            yield there, lambda name=name: read[name](name)  # type: ignore[misc]
    for layer in range(config.num_hidden_layers):
        here, block = f"model.layers.{layer}.", f"blk.{layer}."
        for name, there in PLAIN.items():
            if here + name in read:
                yield block + there, lambda name=here + name: read[name](name)  # type: ignore[misc]
        if (name := here + "mlp.shared_expert_gate.weight") in read:
            yield (
                block + "ffn_gate_inp_shexp.weight",
                lambda name=name: read[name](name).flatten(),  # type: ignore[misc]
            )
        if (name := here + "self_attn.kv_b_proj.weight") in read:
            for part in ("k", "v"):
                yield (
                    f"{block}attn_{part}_b.weight",
                    lambda name=name, part=part: _up(config, read[name](name), part),  # type: ignore[misc]
                )
        for kind in ("gate", "up", "down"):
            names = [
                f"{here}mlp.experts.{expert}.{kind}_proj.weight"
                for expert in range(_experts(config))
            ]
            if names and names[0] in read:
                yield (
                    f"{block}ffn_{kind}_exps.weight",
                    lambda names=names: torch.stack([read[n](n) for n in names]),  # type: ignore[misc]
                )


def _experts(config: Any) -> int:
    values = vars(config)
    return values.get("num_experts") or values.get("n_routed_experts") or 0


def _up(config: Any, weight: Tensor, part: str) -> Tensor:
    """Take the map from the latent apart: to keys (H, R, Dn), to values (H, Dv, R)."""
    maps = weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = maps.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    return (keys.transpose(1, 2) if part == "k" else values).contiguous()


def _stored(name: str, tensor: Tensor) -> tuple[Any, Any]:
    """Return a tensor as an array, and the kind it has in the file."""
    if name.endswith(EXACT) or tensor.ndim == 1:
        return tensor.to(torch.float32).numpy(), gguf.GGMLQuantizationType.F32
    raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return raw.view(np.uint8), gguf.GGMLQuantizationType.BF16


def _quantise(source: Path, target: Path, weights: str) -> None:
    import llama_cpp

    kinds = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = kinds[weights]
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options)
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {source} to {weights}")
