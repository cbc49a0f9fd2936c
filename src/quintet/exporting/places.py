"""Maps a release's tensors to GGUF: names, slices of stacks, halves of maps."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quintet.errors import UnsupportedModelError
from quintet.gguf.names import LAYER, OUTSIDE
from quintet.gguf.types import BY_NAME, BlockType

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor of the file, or a slice of it, and its source in a release's tensor.

    Attributes:
        name: of the file's tensor.
        shape: of the file's tensor.
        slice: which of the equal slices along the first axis; None for all of it.
        take: makes it of the release's tensor.
    """

    name: str
    shape: Shape
    slice: int | None = None
    take: Callable[[Tensor], Tensor] = torch.Tensor.contiguous


_TO_FILE = {ours: theirs for theirs, ours in OUTSIDE.items()}
_IN_LAYER = {ours: theirs for theirs, ours in LAYER.items()}
_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<what>.+?)(\.(?P<leaf>weight|bias))?")
_EXPERT = re.compile(r"mlp\.experts\.(?P<expert>\d+)\.(?P<which>gate|up|down)_proj")
_SHARED = re.compile(r"mlp\.shared_experts?\.(?P<which>gate|up|down)_proj")
# Few numbers, of which much depends: as they are in every file.
_EXACT = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "_norm.weight", ".bias")


def places_of(name: str, shape: Shape, values: Mapping[str, Any]) -> list[TensorPlace]:
    """Return the places of a tensor in GGUF; none if GGUF has no place for it.

    Args:
        name: in a release, with an entry for each expert.
        shape: there.
        values: of the config.

    Raises:
        UnsupportedModelError: llama.cpp would run the model without it.
    """
    if name in _TO_FILE:
        return [TensorPlace(_TO_FILE[name], shape)]
    found = _LAYER.fullmatch(name)
    if found is not None:
        layer, module, leaf = int(found["layer"]), found["what"], found["leaf"] or ""
        # Beyond the layers are the ones that predict further tokens, which converters leave out.
        if layer >= values["num_hidden_layers"]:
            return []
        block = f"blk.{layer}."
        if module == "mlp.gate.e_score_correction_bias":
            return [TensorPlace(f"{block}exp_probs_b.bias", shape)]
        if expert := _EXPERT.fullmatch(module):
            count: int = values["num_experts" if "num_experts" in values else "n_routed_experts"]
            stack_name = f"{block}ffn_{expert['which']}_exps.{leaf}"
            return [TensorPlace(stack_name, (count, *shape), int(expert["expert"]))]
        if shared := _SHARED.fullmatch(module):
            return [TensorPlace(f"{block}ffn_{shared['which']}_shexp.{leaf}", shape)]
        if module == "mlp.shared_expert_gate":
            return [
                TensorPlace(f"{block}ffn_gate_inp_shexp.{leaf}", shape[-1:], take=Tensor.flatten)
            ]
        if module == "self_attn.kv_b_proj":
            return _halves(block, values)
        if module in _IN_LAYER and leaf:
            return [TensorPlace(f"{block}{_IN_LAYER[module]}.{leaf}", shape)]
    raise UnsupportedModelError(
        f"llama.cpp has no place for {name} {list(shape)}, and would run the model without it"
    )


def _halves(block: str, values: Mapping[str, Any]) -> list[TensorPlace]:
    """Return the two places of a map from a latent: to keys (H, R, Dn), to values (H, Dv, R)."""
    heads, rank = values["num_attention_heads"], values["kv_lora_rank"]
    sizes = [values["qk_nope_head_dim"], values["v_head_dim"]]

    def keys(weight: Tensor) -> Tensor:
        maps = weight.view(heads, sum(sizes), rank)
        return maps[:, : sizes[0]].transpose(1, 2).contiguous()

    def outputs(weight: Tensor) -> Tensor:
        return weight.view(heads, sum(sizes), rank)[:, sizes[0] :].contiguous()

    return [
        TensorPlace(f"{block}attn_k_b.weight", (heads, rank, sizes[0]), take=keys),
        TensorPlace(f"{block}attn_v_b.weight", (heads, sizes[1], rank), take=outputs),
    ]


def kind_of(name: str, shape: Shape, wanted: BlockType, *, tied: bool) -> BlockType:
    """Return the type of a tensor in a file of a type.

    Vectors, norms and routers are F32 whatever the rest is; rows that are no multiple of a block
    F16; and of a file of four bits, what makes the logits has eight.
    """
    if len(shape) == 1 or name.endswith(_EXACT):
        return BY_NAME["F32"]
    if shape[-1] % wanted.weights:
        return BY_NAME["F16"]
    head = "token_embd.weight" if tied else "output.weight"
    if wanted.name == "Q4_0" and name == head:
        return BY_NAME["Q8_0"]
    return wanted
