"""Decoder layers, as many as there are in a row, in one call where few tokens pass them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from quintet.kernels import parts
from quintet.kernels.stack import Stack
from quintet.layers.linear import hooked
from quintet.layers.norm import RMSNorm
from quintet.layers.step import Step
from quintet.ops.attention import sdpa

__all__ = [
    "Gathered",
    "LayerRun",
    "Residual",
    "ResidualLayer",
    "StackPart",
    "fits",
    "gather",
    "untouched",
]

# More tokens are a prompt, for which it is the products that take time.
MOST_TOKENS = 16
Module = TypeVar("Module", bound=nn.Module)


class StackPart(nn.Module, ABC):
    """A module that can say what it computes to a kernel, which then does it in its place."""

    @abstractmethod
    def part(self, norm: parts.Norm) -> parts.Part | None:
        """Return what the module holds, behind a norm; None where it has to be called."""

    def kept(self, step: Step) -> tuple[Tensor, ...] | None:
        """Return what of a step's cache the kernel is to change; None where it cannot."""
        return ()


class Residual(NamedTuple):
    """x += module(norm(x))."""

    norm: nn.Module
    module: nn.Module


class ResidualLayer(nn.Module, ABC):
    """A layer that is nothing but a few x += module(norm(x)), one after the other."""

    @abstractmethod
    def residuals(self) -> Sequence[Residual]:
        """Return what the layer consists of, for those that run it without calling it."""


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Layers in a row, and what they hold, taken down to run them in one call.

    Attributes:
        layers: what is called where they cannot be.
        stack: their weights; None where they never can.
        modules: the parts of the stack.
    """

    layers: tuple[nn.Module, ...]
    stack: Stack | None = None
    modules: tuple[StackPart, ...] = ()

    def in_one_call(self, hidden: Tensor, step: Step) -> Tensor | None:
        """Return what the layers make of (B, T, C); None where they have to be called."""
        if self.stack is None:
            return None
        kept = []
        for module in self.modules:
            tensors = module.kept(step)
            if tensors is None:
                return None
            kept.append(tensors)
        starts = step.span.start
        tokens = parts.Tokens(
            step.cos,
            step.sin,
            [starts] * len(hidden) if isinstance(starts, int) else starts.tolist(),
            step.span.counts,
        )
        return self.stack.run(hidden, tokens, kept)


@dataclass(frozen=True, slots=True)
class Gathered:
    """All layers of a model, as runs."""

    runs: tuple[LayerRun, ...]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of a model has weights of its own to gather.
        return type(None), ()


def fits(hidden: Tensor, step: Step) -> bool:
    """Tell whether layers that can be are to be run in one call for tokens (B, T, C)."""
    return (
        step.cache is not None
        and step.attend is sdpa
        and hidden.shape[:2].numel() <= MOST_TOKENS
        and not any(seen.custom for seen in step.seen.values())
    )


def gather(layers: Iterable[nn.Module], C: int, dtype: torch.dtype) -> Gathered:
    """Take down what layers hold, as many in a row together as can be run in one call.

    They have to be called where a module is hooked or replaced by another.
    """
    runs = []
    described = [(layer, _described(layer)) for layer in layers]
    for stackable, group in groupby(described, key=lambda pair: pair[1] is not None):
        run = list(group)
        own = tuple(layer for layer, _ in run)
        held = list(chain.from_iterable(found for _, found in run if found is not None))
        stack = Stack.of([part for _, part in held], C, dtype) if stackable else None
        runs.append(LayerRun(own, stack, tuple(module for module, _ in held)))
    return Gathered(tuple(runs))


def _described(layer: nn.Module) -> list[tuple[StackPart, parts.Part]] | None:
    # A subclass with another forward has to say again what it consists of.
    if not isinstance(layer, ResidualLayer) or "residuals" not in vars(type(layer)):
        return None
    if hooked(layer):
        return None
    described = []
    for norm, module in layer.residuals():
        if not isinstance(module, StackPart) or "part" not in vars(type(module)):
            return None
        plain = untouched(norm, RMSNorm)
        if plain is None or hooked(module):
            return None
        part = module.part(parts.Norm(plain.weight, plain.variance_epsilon))
        if part is None:
            return None
        described.append((module, part))
    return described


def untouched(module: nn.Module | None, kind: type[Module]) -> Module | None:
    """Return a module that is of a class, not one derived from it, and nothing more; else None."""
    return module if type(module) is kind and not hooked(module) else None
