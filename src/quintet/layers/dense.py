"""Dense decoder layers, and all of a model's in one call where few tokens pass them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.kernels.stack import Block, Stack
from quintet.layers.attention import Attention
from quintet.layers.linear import hooked, matrices
from quintet.layers.mlp import GatedMLP
from quintet.layers.norm import RMSNorm
from quintet.layers.step import Step
from quintet.ops.attention import sdpa

__all__ = ["DenseLayer", "Gathered", "Parts", "gather", "in_one_call"]

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


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a model's layers hold, taken down to run them in one call.

    Attributes:
        stack: their weights.
        indices: their places in the cache.
        scale: of the scores.
        eps: of the norms.
    """

    stack: Stack
    indices: tuple[int, ...]
    scale: float
    eps: float

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of a model has weights of its own to gather.
        return type(None), ()

    def run(self, hidden: Tensor, step: Step) -> Tensor | None:
        """Return what the layers make of (B, T, C); None where they have to be called."""
        cache, starts = step.cache, step.span.start
        if cache is None or not _fits(hidden, step):
            return None
        held = []
        for index in self.indices:
            room = cache.room(index, step.span)
            if room is None:
                return None
            held.append(room)
        return self.stack.run(
            hidden,
            held,
            step.cos,
            step.sin,
            starts=[starts] * len(hidden) if isinstance(starts, int) else starts.tolist(),
            scale=self.scale,
            eps=self.eps,
        )


def in_one_call(layers: Iterable[nn.Module], hidden: Tensor, step: Step) -> Tensor | None:
    """Return what the layers make of (B, T, C) in one call of a kernel; None where it cannot."""
    if not _fits(hidden, step):
        return None
    gathered = gather(layers, hidden.dtype)
    return None if gathered is None else gathered.run(hidden, step)


def gather(layers: Iterable[nn.Module], dtype: torch.dtype) -> Gathered | None:
    """Take down what the layers hold; None where they have to be called.

    They have to be where a module is hooked or replaced by another.
    """
    blocks, indices = [], []
    scales: set[float] = set()
    numbers: set[float] = set()
    head_dim = 0
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
        if mlp.act_fn is not F.silu or (attention.training and attention.attention_dropout):
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
        if held is None:
            return None
        q, k, v, o, gate, up, down = held
        blocks.append(
            Block(norm.weight, (q, k, v), o, mlp_norm.weight, gate, up, down, attention.window)
        )
        indices.append(attention.layer_idx)
        scales.add(attention.scaling)
        numbers |= {norm.variance_epsilon, mlp_norm.variance_epsilon}
        head_dim = attention.head_dim
    if len(scales) != 1 or len(numbers) != 1:
        return None
    stack = Stack.of(blocks, head_dim=head_dim, dtype=dtype)
    if stack is None:
        return None
    return Gathered(stack, tuple(indices), scales.pop(), numbers.pop())


def _fits(hidden: Tensor, step: Step) -> bool:
    return (
        step.cache is not None
        and step.attend is sdpa
        and hidden.shape[:2].numel() <= MOST_TOKENS
        and not any(seen.custom for seen in step.seen.values())
    )
