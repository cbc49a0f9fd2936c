"""The tensors of a GGUF file under the names of a release, and as parts where it has several."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from quintet.errors import CheckpointError, listed
from quintet.gguf.config import ROPE_FREQS
from quintet.gguf.container import GGUFFile, GGUFTensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Rows of a tensor under the name they have in a release.

    Attributes:
        start: where in the tensor's file they begin.
        heads: how many heads have their rows in the order of pairs, not of halves; 0 for none.
    """

    name: str
    tensor: GGUFTensor
    shape: Shape
    start: int
    heads: int = 0


OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# What each layer may have, without `.weight`.
LAYER: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "attn_k_b": "self_attn.k_b_proj",
        "attn_v_b": "self_attn.v_b_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "nextn.eh_proj": "eh_proj",
        "nextn.enorm": "enorm",
        "nextn.hnorm": "hnorm",
        "nextn.embed_tokens": "embed_tokens",
        "nextn.shared_head_head": "shared_head.head",
        "nextn.shared_head_norm": "shared_head.norm",
    }
)
_DENSE = ("ffn_gate", "ffn_up", "ffn_down")
_HEADS = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
_EXPERTS_OF = ("ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps")
_SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
# What the layers of an architecture have; the others would be missed in the answers.
_OF: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "qwen2": frozenset((*_HEADS, *_DENSE)),
        "llama": frozenset((*_HEADS, *_DENSE)),
        "qwen2moe": frozenset((*_HEADS, *_EXPERTS_OF, *_SHARED, "ffn_gate_inp_shexp")),
        "deepseek2": frozenset(
            (
                *("attn_norm", "ffn_norm", "attn_output", "attn_q", "attn_q_a", "attn_q_a_norm"),
                *("attn_q_b", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_kv_b"),
                *("attn_k_b", "attn_v_b", "exp_probs_b"),
                *(*_DENSE, *_EXPERTS_OF, *_SHARED),
                *(name for name in LAYER if name.startswith("nextn.")),
            )
        ),
    }
)
_BIASED = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_BLOCK = re.compile(r"blk\.(?P<layer>\d{1,6})\.(?P<what>.+)\.(?P<leaf>weight|bias)")
_EXPERTS = re.compile(r"ffn_(?P<which>gate|up|down|gate_up)_(?P<of>exps|shexp)")


def release_parts(file: GGUFFile, architecture: str, values: Mapping[str, Any]) -> list[WeightPart]:
    """Return the parts of a file in the order of its data; `values` are those of its config.

    Raises:
        CheckpointError: tensors that the architecture has no place for, or that cannot be cut.
    """
    parts: list[WeightPart] = []
    unknown: list[str] = []
    for name, tensor in file.tensors.items():
        if name == ROPE_FREQS or _is_made_of_others(name, file):
            continue
        found = list(_parts(name, tensor, architecture, values))
        parts += found
        if not found:
            unknown.append(f"{name}: {tensor.type.name} {list(tensor.shape)}")
    if unknown:
        raise CheckpointError(
            f"{file.path} has {len(unknown)} tensors that a model of the architecture "
            f"{architecture} has no place for:\n{listed(unknown)}\nIt asks for something that is "
            "not here, and would answer wrongly without"
        )
    order = {path: number for number, path in enumerate(file.files)}
    return sorted(parts, key=lambda part: (order[part.tensor.file], part.start))


def _is_made_of_others(name: str, file: GGUFFile) -> bool:
    """Return whether a tensor is the half of another one that is there, too."""
    whole = re.sub(r"\.attn_[kv]_b\.weight$", ".attn_kv_b.weight", name)
    return whole != name and whole in file.tensors


def _parts(
    name: str, tensor: GGUFTensor, architecture: str, values: Mapping[str, Any]
) -> Iterator[WeightPart]:
    if name in OUTSIDE:
        yield WeightPart(OUTSIDE[name], tensor, tensor.shape, tensor.start)
        return
    if (found := _BLOCK.fullmatch(name)) is None:
        return
    layer, module, leaf = f"model.layers.{int(found['layer'])}.", found["what"], found["leaf"]
    last = values["num_hidden_layers"] + values.get("num_nextn_predict_layers", 0)
    if module not in _OF[architecture] or int(found["layer"]) >= last:
        return
    biased = module in _BIASED and architecture != "deepseek2"
    if (leaf == "bias") != (module == "exp_probs_b") and not biased:
        return
    if module == "exp_probs_b":
        yield _whole(f"{layer}mlp.gate.e_score_correction_bias", tensor)
    elif module == "attn_qkv":
        yield from _queries_keys_values(layer, leaf, tensor, values)
    elif experts := _EXPERTS.fullmatch(module):
        yield from _experts(layer, experts["which"], experts["of"], tensor, values)
    elif module in LAYER:
        named = f"{layer}{LAYER[module]}.{leaf}"
        # Vectors stand for matrices of one row there.
        shape = (1, *tensor.shape) if module == "ffn_gate_inp_shexp" and leaf == "weight" else ()
        whole = shape if len(shape) == 2 else tensor.shape
        if module in ("attn_k_b", "attn_v_b"):
            _check_half(name, module, tensor, values)
        heads = 0
        if architecture == "llama":
            key = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(module)
            heads = values[key] if key else 0
        if heads and tensor.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{tensor.file}: {name} has the shape {list(tensor.shape)}, which is not {heads} "
                "heads of pairs"
            )
        yield WeightPart(named, tensor, whole, tensor.start, heads)


def _whole(name: str, tensor: GGUFTensor) -> WeightPart:
    return WeightPart(name, tensor, tensor.shape, tensor.start)


def _rows(name: str, tensor: GGUFTensor, first: int, shape: Shape) -> WeightPart:
    """Return a part that begins with a row; of a vector, with a number."""
    row_bytes = tensor.nbytes // math.prod(tensor.shape[: max(len(tensor.shape) - 1, 1)])
    return WeightPart(name, tensor, shape, tensor.start + first * row_bytes)


def _queries_keys_values(
    layer: str, leaf: str, tensor: GGUFTensor, values: Mapping[str, Any]
) -> Iterator[WeightPart]:
    """Cut the maps to queries, keys and values, which lie on top of each other, apart."""
    size = values.get("head_dim") or 0
    groups = values["num_key_value_heads"] * size
    heights = {"q": values["num_attention_heads"] * size, "k": groups, "v": groups}
    if sum(heights.values()) != tensor.shape[0] or not size:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} has the shape {list(tensor.shape)}, and queries, keys "
            f"and values have {heights} rows"
        )
    first = 0
    for which, height in heights.items():
        shape = (height, *tensor.shape[1:])
        yield _rows(f"{layer}self_attn.{which}_proj.{leaf}", tensor, first, shape)
        first += height


def _experts(
    layer: str, which: str, group: str, tensor: GGUFTensor, values: Mapping[str, Any]
) -> Iterator[WeightPart]:
    """Split a stack of experts."""
    if group == "shexp":
        shared = "shared_expert" if values["model_type"] == "qwen2_moe" else "shared_experts"
        yield _whole(f"{layer}mlp.{shared}.{which}_proj.weight", tensor)
        return
    count = values.get("num_experts") or values.get("n_routed_experts")
    kinds = which.split("_")
    if len(tensor.shape) != 3 or tensor.shape[0] != count or tensor.shape[1] % len(kinds):
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} has the shape {list(tensor.shape)}, which is no stack "
            f"of {count} experts"
        )
    _, rows, columns = tensor.shape
    height = rows // len(kinds)
    for expert in range(tensor.shape[0]):
        for number, kind in enumerate(kinds):
            name = f"{layer}mlp.experts.{expert}.{kind}_proj.weight"
            yield _rows(name, tensor, expert * rows + number * height, (height, columns))


def _check_half(name: str, module: str, tensor: GGUFTensor, values: Mapping[str, Any]) -> None:
    """Hold the shape against the config: together, halves of other shapes could seem to fit."""
    heads, rank = values["num_attention_heads"], values["kv_lora_rank"]
    wanted = (heads, rank, values["qk_nope_head_dim"])
    if module == "attn_v_b":
        wanted = (heads, values["v_head_dim"], rank)
    if tensor.shape != wanted:
        raise CheckpointError(
            f"{tensor.file}: {name} has the shape {list(tensor.shape)}, and the metadata asks for "
            f"{list(wanted)}"
        )
