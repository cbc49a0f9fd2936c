"""Dense decoder layers, and all of a model's in one call where few tokens pass them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.kernels.stack import Block, stack
from quintet.layers.attention import Attention
from quintet.layers.linear import hooked, matrices
from quintet.layers.mlp import GatedMLP
from quintet.layers.norm import RMSNorm
from quintet.layers.step import Step
from quintet.ops.attention import sdpa

__all__ = ["DenseLayer", "Parts", "in_one_call"]

# More tokens are a prompt, for which it is the products that take time.
MOST_TOKENS = 16


class Parts(NamedTuple):
    """What a dense layer consists of, in the order in which it runs."""

    attention_norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module


class DenseLayer(nn.Module, ABC):
    """x += attention(norm(x)), then x += mlp(norm(x))."""

    @abstractmethod
    def parts(self) -> Parts:
        """Return what the layer consists of, for those that run it without calling it."""


def in_one_call(layers: Iterable[nn.Module], hidden: Tensor, step: Step) -> Tensor | None:
    """Return what the layers make of (B, T, C) in one call of a kernel; None where it cannot.

    It cannot where a module is hooked or replaced by another: those have to be called.
    """
    cache, starts = step.cache, step.span.start
    if cache is None or step.attend is not sdpa or hidden.shape[:2].numel() > MOST_TOKENS:
        return None
    blocks: list[Block] = []
    scale = eps = 0.0
    for layer in layers:
        # A subclass with another forward has to say again what it consists of.
        if not isinstance(layer, DenseLayer) or "parts" not in vars(type(layer)) or hooked(layer):
            return None
        norm, attention, mlp_norm, mlp = layer.parts()
        if type(norm) is not RMSNorm or type(mlp_norm) is not RMSNorm:
            return None
        if type(attention) is not Attention or type(mlp) is not GatedMLP:
            return None
        if hooked(norm) or hooked(attention) or hooked(mlp_norm) or hooked(mlp):
            return None
        if mlp.act_fn is not F.silu or norm.variance_epsilon != mlp_norm.variance_epsilon:
            return None
        seen = step.seen[attention.window]
        if seen.custom or (attention.training and attention.attention_dropout):
            return None
        held = matrices(
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
        )
        room = cache.room(attention.layer_idx, step.span)
        if held is None or room is None:
            return None
        q, k, v, o, gate, up, down = held
        blocks.append(
            Block(norm.weight, (q, k, v), o, mlp_norm.weight, gate, up, down, *room, seen.window)
        )
        scale, eps = attention.scaling, norm.variance_epsilon
    return stack(
        hidden,
        blocks,
        step.cos,
        step.sin,
        starts=[starts] * len(hidden) if isinstance(starts, int) else starts.tolist(),
        scale=scale,
        eps=eps,
    )
