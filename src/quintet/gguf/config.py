"""The keys of a `config.json`, made of the metadata and the tensors' shapes of a GGUF file."""

import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from quintet.errors import CheckpointError, UnsupportedModelError, shown
from quintet.folder import AdapterFolderError
from quintet.gguf.container import GGUFFile, GGUFTensor
from quintet.gguf.values import Values

# What an architecture may say and our families cannot; where such a key says nothing, it is none.
_OTHERS = (
    *(
        "attention.sliding_window",
        "attention.scale",
        "attention.clamp_kqv",
        "attention.max_alibi_bias",
    ),
    *("attention.temperature_scale", "attn_logit_softcapping", "final_logit_softcapping"),
    *("logit_scale", "embedding_scale", "residual_scale", "interleave_moe_layer_step"),
    *("use_parallel_residual", "attention.layer_norm_epsilon", "pooling_type"),
)
# Llama 3 changes its frequencies, and files have the result alone: the factors of 1 and 4, of the
# 8192 tokens it was trained on first (arXiv:2407.21783).
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPE_FREQS = "rope_freqs.weight"


def config_values(file: GGUFFile) -> dict[str, Any]:
    """Return the keys of `config.json` that describe the model in a GGUF file.

    Raises:
        UnsupportedModelError: no family here is of that architecture, or has what it asks for;
            or the file is an adapter.
        CheckpointError: keys are missing, of another kind, or contradict the tensors.
    """
    general = Values(file.path, file.metadata)
    name = general.text("general.architecture", "") or ""
    kind = general.text("general.type", "model")
    if kind == "adapter":
        raise AdapterFolderError(file.path, base_of(general))
    if kind != "model":
        raise UnsupportedModelError(
            f"{file.path} is no model (general.type={shown(kind)}); name the file of the model"
        )
    if name not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path} is of the architecture {shown(name)}, which is not supported; there are "
            f"{', '.join(_ARCHITECTURES)}"
        )
    fields = Values(file.path, file.metadata, f"{name}.")
    _refuse_others(fields)
    model_type, values = _ARCHITECTURES[name](file, fields)
    ends = {
        f"{end}_token_id": general.integer(f"tokenizer.ggml.{end}_token_id")
        for end in ("bos", "eos")
    }
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    return {
        "model_type": model_type,
        **_common(file, fields),
        **values,
        **ends,
        "dtype": _dtype(matrices),
        "quantization_config": {
            "quant_method": "gguf",
            "types": dict(Counter(tensor.type.name for tensor in file.tensors.values())),
        },
    }


def base_of(general: Values) -> str | None:
    """Return the model that an adapter was trained on, if its file says so: a hub id, or a name."""
    url = general.text("general.base_model.0.repo_url") or ""
    name = url.removeprefix("https://huggingface.co/")
    return name or general.text("general.base_model.0.name")


def _refuse_others(fields: Values) -> None:
    for key in _OTHERS:
        if fields.metadata.get(fields.prefix + key) not in (None, False, 0, 0.0):
            raise UnsupportedModelError(
                f"{fields.path} has "
                f"{fields.prefix + key}={shown(fields.metadata[fields.prefix + key])}, which no "
                "family here can do"
            )
    if not fields.truth("attention.causal", True):
        raise UnsupportedModelError(
            f"{fields.path} sees what comes after a token, too "
            f"({fields.prefix}attention.causal=False); the models here do not"
        )


def _common(file: GGUFFile, fields: Values) -> dict[str, Any]:
    predicted = fields.integer("nextn_predict_layers", 0) or 0
    layers = fields.needed("block_count") - predicted
    # Each has tensors; before a model of so many is thought of.
    if not 0 < layers <= len(file.tensors):
        fields.refuse(
            "block_count", f"the number of layers, of which {len(file.tensors)} tensors are"
        )
    return {
        "vocab_size": _vocabulary(file, fields),
        "hidden_size": fields.needed("embedding_length"),
        "intermediate_size": fields.needed("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": fields.needed("attention.head_count"),
        "max_position_embeddings": fields.needed("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(fields),
    }


def _vocabulary(file: GGUFFile, fields: Values) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{file.path} has no token_embd.weight, the vectors of the tokens; is it a part of a "
            "model, or its vocabulary alone?"
        )
    rows = embedding.shape[0]
    if fields.integer("vocab_size", rows) != rows:
        fields.refuse("vocab_size", f"{rows}, the rows of token_embd.weight")
    tokens = Values(file.path, file.metadata).texts("tokenizer.ggml.tokens") or ()
    if len(tokens) > rows:
        raise CheckpointError(
            f"{file.path} has {len(tokens)} tokens, and token_embd.weight rows for {rows}"
        )
    return rows


def _rope(fields: Values) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": fields.number("rope.freq_base", 10_000.0),
    }
    kind = fields.text("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0)) or 1.0
    # The name of a kind without a factor is the default of a converter, and scales nothing.
    if kind == "none" or factor == 1.0:
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{fields.path} scales its positions by {shown(kind)} "
            f"({fields.prefix}rope.scaling.type); there are linear and yarn"
        )
    if not 0 < factor < math.inf:
        raise CheckpointError(
            f"{fields.path} has {fields.prefix}rope.scaling.factor={factor}, which has to be "
            "finite and greater than 0"
        )
    rope |= {"rope_type": kind, "factor": factor}
    return rope if kind == "linear" else {**rope, **_yarn(fields, factor)}


def _yarn(fields: Values, factor: float) -> dict[str, Any]:
    length = fields.integer("rope.scaling.original_context_length")
    named = {
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast"),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow"),
        "original_max_position_embeddings": length,
    }
    extrapolated = fields.number("rope.scaling.yarn_ext_factor", 1.0)
    if extrapolated not in (1.0, -1.0):
        fields.refuse("rope.scaling.yarn_ext_factor", "1")
    temperature = fields.number("rope.scaling.yarn_attn_factor")
    if temperature is None:
        temperature = fields.number("rope.scaling.attn_factor", 1.0)
    log = fields.number("rope.scaling.yarn_log_multiplier", 0.0) or 0.0
    if log:
        named |= {"mscale": _digits(log * 10), "mscale_all_dim": _digits(log * 10)}
        if temperature != 1.0:
            fields.refuse("rope.scaling.yarn_log_multiplier", "without a yarn_attn_factor")
    elif temperature not in (None, 1.0):
        named["attention_factor"] = _digits(temperature * (0.1 * math.log(factor) + 1))
    return {key: value for key, value in named.items() if value is not None}


def _digits(value: float) -> float:
    return float(f"{value:.7g}")


def _heads(fields: Values, width: int) -> dict[str, Any]:
    """Return the heads of grouped-query attention, whose keys are as long as values and turned."""
    heads = fields.needed("attention.head_count")
    size = fields.integer("attention.key_length", fields.integer("rope.dimension_count"))
    if size is None:
        size = width // heads if heads > 0 else 0
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, size) != size:
            raise UnsupportedModelError(
                f"{fields.path} has {fields.prefix + key}={fields.integer(key)} and heads of "
                f"{size}; where they differ, it is another model than those here"
            )
    return {
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": size,
    }


def _qwen2(file: GGUFFile, fields: Values) -> tuple[str, dict[str, Any]]:
    if fields.integer("expert_count", 0):
        fields.refuse("expert_count", "0: this architecture has none here")
    return "qwen2", {
        "architectures": ["Qwen2ForCausalLM"],
        **_heads(fields, fields.needed("embedding_length")),
    }


def _llama(file: GGUFFile, fields: Values) -> tuple[str, dict[str, Any]]:
    """A Qwen2 without biases, but for the frequencies of Llama 3."""
    model_type, values = _qwen2(file, fields)
    if ROPE_FREQS in file.tensors:
        values["rope_parameters"] = _llama3(
            file, fields, file.tensors[ROPE_FREQS], values["head_dim"]
        )
    return model_type, values


def _llama3(file: GGUFFile, fields: Values, tensor: GGUFTensor, size: int) -> dict[str, Any]:
    rope = _rope(fields)
    if rope["rope_type"] != "default" or tensor.type.name != "F32" or tensor.shape != (size // 2,):
        raise UnsupportedModelError(
            f"{file.path} has {ROPE_FREQS} of {tensor.type.name} {list(tensor.shape)} with "
            f"{shown(rope)}, which are no frequencies known here"
        )
    with tensor.file.open("rb") as opened:
        opened.seek(tensor.start)
        found = struct.unpack(f"<{size // 2}f", opened.read(tensor.nbytes))
    factor = _digits(max(found))
    theta, length = rope["rope_theta"], _LLAMA3["original_max_position_embeddings"]
    if not (0 < theta < math.inf and all(0 < value < math.inf for value in found)):
        raise CheckpointError(
            f"{file.path} has {ROPE_FREQS} from {min(found)} to {factor}, and frequencies of "
            f"{theta} ({fields.prefix}rope.freq_base); they have to be finite and greater than 0"
        )
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    for pair, value in enumerate(found):
        turns = length / (2 * math.pi * theta ** (2 * pair / size))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(value, 1 / ((1 - share) / factor + share), rel_tol=1e-3):
            raise UnsupportedModelError(
                f"{file.path} has {ROPE_FREQS} that are not those of Llama 3 with a factor of "
                f"{factor}: {value:.6g} where it has {1 / ((1 - share) / factor + share):.6g}"
            )
    return {**rope, "rope_type": "llama3", "factor": factor, **_LLAMA3}


def _qwen2_moe(file: GGUFFile, fields: Values) -> tuple[str, dict[str, Any]]:
    wide, active = fields.needed("feed_forward_length"), fields.needed("expert_used_count")
    return "qwen2_moe", {
        "architectures": ["Qwen2MoeForCausalLM"],
        **_heads(fields, fields.needed("embedding_length")),
        "tie_word_embeddings": False,
        "num_experts": fields.needed("expert_count"),
        "num_experts_per_tok": active,
        "moe_intermediate_size": fields.integer(
            "expert_feed_forward_length", wide // active if active > 0 else 0
        ),
        "shared_expert_intermediate_size": fields.integer(
            "expert_shared_feed_forward_length", wide
        ),
        "norm_topk_prob": fields.truth("expert_weights_norm", False),
        "qkv_bias": any(name.endswith(("attn_q.bias", "attn_qkv.bias")) for name in file.tensors),
    }


def _deepseek(file: GGUFFile, fields: Values) -> tuple[str, dict[str, Any]]:
    sigmoid = any(name.endswith(".exp_probs_b.bias") for name in file.tensors)
    gating = fields.integer("expert_gating_func", 1)
    if gating not in (1, 2):
        fields.refuse("expert_gating_func", "1 for softmax or 2 for sigmoid")
    sigmoid = sigmoid or gating == 2
    heads, turned = fields.needed("attention.head_count"), fields.needed("rope.dimension_count")
    # Older files have the sizes of a head, newer ones those of the latent beside them.
    long = fields.integer("attention.key_length_mla", fields.integer("attention.key_length"))
    if long is None or long <= turned:
        raise CheckpointError(
            f"{fields.path} has {fields.prefix}attention.key_length={long}, which has to be more "
            f"than the {turned} of rope.dimension_count"
        )
    experts = fields.integer("expert_count", 0) or None
    values = {
        "architectures": [f"DeepseekV{3 if sigmoid else 2}ForCausalLM"],
        "num_key_value_heads": heads,
        "q_lora_rank": fields.integer("attention.q_lora_rank") or None,
        "kv_lora_rank": fields.needed("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": long - turned,
        "v_head_dim": fields.integer(
            "attention.value_length_mla", fields.integer("attention.value_length")
        ),
        "first_k_dense_replace": fields.integer("leading_dense_block_count", 0),
        "n_routed_experts": experts,
        "num_experts_per_tok": fields.needed("expert_used_count") if experts else None,
        "moe_intermediate_size": fields.needed("expert_feed_forward_length") if experts else 1,
        "n_shared_experts": fields.integer("expert_shared_count") or None,
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": fields.truth("expert_weights_norm", False),
        **_groups(fields, experts or 0, sigmoid),
    }
    if not sigmoid:
        return "deepseek_v2", values
    named = any(".nextn." in name for name in file.tensors)
    values["num_nextn_predict_layers"] = fields.integer("nextn_predict_layers", 0) if named else 0
    return "deepseek_v3", values


def _groups(fields: Values, experts: int, sigmoid: bool) -> dict[str, Any]:
    """Return the groups a token's experts are chosen in; older files do not say that."""
    released = {(160, False): (8, 3), (256, True): (8, 4)}
    groups, chosen = released.get((experts, sigmoid), (1, 1))
    groups = fields.integer("expert_group_count", groups) or 1
    chosen = fields.integer("expert_group_used_count", chosen) or 1
    if sigmoid:
        return {"n_group": groups, "topk_group": chosen}
    method = "group_limited_greedy" if groups > 1 else "greedy"
    return {"n_group": groups, "topk_group": chosen, "topk_method": method}


def _dtype(matrices: list[GGUFTensor]) -> str:
    """Return the dtype of plain tensors: float32 if most bytes are, else bfloat16."""
    nbytes = Counter[str]()
    for tensor in matrices:
        nbytes[tensor.type.name] += tensor.nbytes
    most = max(nbytes, key=lambda name: nbytes[name], default="F32")
    return "float32" if most == "F32" else "bfloat16"


_ARCHITECTURES: Mapping[str, Callable[[GGUFFile, Values], tuple[str, dict[str, Any]]]] = (
    MappingProxyType(
        {"qwen2": _qwen2, "qwen2moe": _qwen2_moe, "deepseek2": _deepseek, "llama": _llama}
    )
)
