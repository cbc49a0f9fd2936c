"""Roles of parameters: matrices, and those without weight decay."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from quintet.layers.mamba2 import CausalConv1d
from quintet.modeling.base import PreTrainedModel
from quintet.training.optimizers.settings import Role

_STATE = re.compile(r"\.(A_log|D|dt_bias)$")
_ROUTER = re.compile(r"\.(gate|shared_expert_gate)\.weight$")
# A gate and what it gates, one above the other; Zamba2's low-rank factor adds to both.
_GATE_UP = re.compile(r"\.gate_up_proj(\.weight|_adapter_list\.\d+\.1\.weight)?$")
# The rows of what makes queries, keys and values are the heads', one above the other; a latent's
# keys and values of a head lie together.
_HEADS = re.compile(r"\.self_attn\.(q_proj|q_b_proj|kv_b_proj)\.weight$")
_KEY_HEADS = re.compile(r"\.self_attn\.(k_proj|v_proj)\.weight$")


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter that is trained.

    Attributes:
        name: its first name in the model.
        parameter: itself.
        role: what it is to the model.
        matrices: of how many matrices its last two axes are made, one above the other.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    matrices: int


def members(model: PreTrainedModel, *, by_head: bool) -> Iterator[Member]:
    """Yield every parameter that is trained, once, whatever it is tied to.

    Args:
        model: whose they are.
        by_head: whether the projections of attention are a matrix a head.
    """
    inside = set(map(id, model.base_model.parameters()))
    # A prediction layer may hold it too, before the model itself does.
    if (head := model.get_output_embeddings()) is not None:
        inside -= set(map(id, head.parameters()))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module = model.get_submodule(name.rpartition(".")[0])
            role = _role(name, parameter, module, inside=id(parameter) in inside)
            yield Member(name, parameter, role, _matrices(name, model, by_head=by_head))


def _matrices(name: str, model: PreTrainedModel, *, by_head: bool) -> int:
    if _GATE_UP.search(name):
        return 2
    if by_head and _HEADS.search(name):
        return int(model.config.to_dict()["num_attention_heads"])
    if by_head and _KEY_HEADS.search(name):
        return int(model.config.to_dict()["num_key_value_heads"])
    return 1


def _role(name: str, parameter: nn.Parameter, module: nn.Module, *, inside: bool) -> Role:
    if name.endswith("bias") and not _STATE.search(name):
        return "bias"
    if ".adapters." in name:
        return "adapter"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if not inside:
        return "head"
    if isinstance(module, CausalConv1d):
        return "conv"
    if _STATE.search(name):
        return "state"
    if parameter.ndim < 2:
        return "norm"
    return "router" if _ROUTER.search(name) else "matrix"
