"""The fused CPU step: consecutive decoder layers in one kernel call, for few tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quintet.kernels import parts
from quintet.kernels.calls import applies
from quintet.kernels.linear import STEP_TOKENS
from quintet.kernels.native import available
from quintet.kernels.shared_buffer import SharedBuffer
from quintet.kernels.stack import Stack
from quintet.layers.context import ForwardContext
from quintet.layers.norm import RMSNorm
from quintet.layers.plain import PlainModule, hooked, sums_in, untouched
from quintet.layers.snapshot import ModuleSnapshot
from quintet.ops.attention import sdpa


class PartSpec(NamedTuple):
    """One part of a layer, as described to the kernel.

    Attributes:
        part: what it holds.
        cache_buffers: the cache tensors that the kernel updates; None if it cannot.
        shared_buffer: where processes sum the part's output; None for one process.
    """

    part: parts.Part
    cache_buffers: Callable[[ForwardContext], tuple[Tensor, ...] | None]
    shared_buffer: SharedBuffer | None = None


class FusedLayer(PlainModule, ABC):
    """A decoder layer that can describe itself to the fused CPU step."""

    @abstractmethod
    def part_specs(self) -> list[PartSpec] | None:
        """Return the layer's parts in forward order, or None if it must be called."""


class FusedPart(PlainModule, ABC):
    """A module that can stand in x += module(norm(x))."""

    @abstractmethod
    def part(self, norm: parts.Norm) -> parts.Part | None:
        """Describe the module behind a norm, or return None if it must be called."""

    def cache_buffers(self, context: ForwardContext) -> tuple[Tensor, ...] | None:
        """Return the cache tensors the kernel updates, or None if it cannot."""
        return ()

    def output_module(self) -> nn.Module:
        """Return the module whose output is added to x: itself or a submodule.

        Behind it, what several processes make may add up; `part` need not look at that.
        """
        return self


def residuals(
    *pairs: tuple[nn.Module, nn.Module], source: parts.Source = parts.Source.HIDDEN
) -> list[PartSpec] | None:
    """Describe a layer that consists of x += module(norm(x)), given pairs (norm, module).

    Args:
        source: what is normalised in place of x.
    """
    specs = []
    for norm, module in pairs:
        # A subclass with another forward has to say again what it holds.
        if not isinstance(module, FusedPart) or "part" not in vars(type(module)):
            return None
        before, output = norm_of(norm, source), module.output_module()
        shared_buffer = sums_in(output) if hooked(output) else None
        called = hooked(output) and shared_buffer is None
        called |= output is not module and hooked(module)
        part = None if before is None or called else module.part(before)
        if part is None:
            return None
        specs.append(PartSpec(part, module.cache_buffers, shared_buffer))
    return specs


def norm_of(module: nn.Module, source: parts.Source = parts.Source.HIDDEN) -> parts.Norm | None:
    """Describe an RMSNorm, or return None if it is another module or hooked."""
    plain = untouched(module, RMSNorm)
    return None if plain is None else parts.Norm(plain.weight, plain.variance_epsilon, source)


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Consecutive layers, with their weights collected for one kernel call.

    Attributes:
        layers: what is called where they cannot be.
        stack: their weights; None if they never can.
        specs: the parts that the stack is made of.
        normalises: whether the norm behind the last layer is one of them.
    """

    layers: tuple[nn.Module, ...]
    stack: Stack | None = None
    specs: tuple[PartSpec, ...] = ()
    normalises: bool = False

    def run_fused(self, hidden: Tensor, context: ForwardContext) -> Tensor | None:
        """Run the layers on (B, T, C) in one call, or return None if they must be called."""
        if self.stack is None:
            return None
        buffers = []
        for spec in self.specs:
            tensors = spec.cache_buffers(context)
            if tensors is None:
                return None
            buffers.append(tensors)
        counts = context.whole.counts if context.rectangular else None
        if counts is None:
            tokens = parts.Tokens(context.cos, context.sin, context.embeds, *_sequences(context))
            return self.stack.run(hidden, tokens, buffers)
        B, T, _ = hidden.shape
        real = torch.arange(T, dtype=torch.long, device=counts.device) < counts[:, None]
        cos, sin, embeds = (
            x.expand(B, *x.shape[1:])[real] for x in (context.cos, context.sin, context.embeds)
        )
        starts = context.whole.starts(B)
        active = [(row, starts[row], n) for row, n in enumerate(counts.tolist()) if n]
        if not active:
            return None
        packed = self.stack.run(
            hidden[real], parts.Tokens(cos, sin, embeds, *zip(*active, strict=True)), buffers
        )
        if packed is None:
            return None
        output = torch.zeros_like(hidden)
        output[real] = packed
        return output


class FusedRuns:
    """The collected layers of a model, reused until something changes."""

    def __init__(self, runs: Sequence[LayerRun], final_norm: nn.Module) -> None:
        self.runs = tuple(runs)
        self._layers = tuple(chain.from_iterable(run.layers for run in runs))
        self._final_norm = final_norm
        # What is called anyway may hold weights of kinds that have no address.
        uncalled = [
            (*run.layers, final_norm) if run.normalises else run.layers
            for run in runs
            if run.stack is not None
        ]
        self._snapshot = ModuleSnapshot(chain.from_iterable(uncalled))

    def serves(self, layers: tuple[nn.Module, ...], final_norm: nn.Module) -> bool:
        """Return whether these are the same layers, unchanged and unhooked."""
        same = layers == self._layers and final_norm is self._final_norm
        return same and self._snapshot.holds()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy of a cache may be gone on with by a copy of the model.
        return type(None), ()


def fits(hidden: Tensor, context: ForwardContext) -> bool:
    """Return whether a forward over (B, T, C) may use the fused step."""
    return (
        context.cache is not None
        and context.attend is sdpa
        and max(one.length for one in context.segments) <= STEP_TOKENS
        and not any(mask.custom for masks in context.masks for mask in masks.values())
        and applies(hidden)
        and available()
    )


def gather(
    layers: Iterable[nn.Module], final_norm: nn.Module, C: int, dtype: torch.dtype
) -> tuple[LayerRun, ...]:
    """Group consecutive layers that can run in one call, and collect their weights.

    They have to be called where a module is hooked or replaced by another.
    """
    described = [(layer, _pieces(layer)) for layer in layers]
    grouped = [list(group) for _, group in groupby(described, key=lambda pair: pair[1] is not None)]
    runs = []
    for group in grouped:
        specs = list(chain.from_iterable(found or () for _, found in group))
        last_norm = norm_of(final_norm) if specs and group is grouped[-1] else None
        if last_norm is not None:
            specs.append(PartSpec(parts.FinalNorm(last_norm), _nothing))
        shared_buffers = [spec.shared_buffer for spec in specs]
        stack = Stack.of([spec.part for spec in specs], C, dtype, shared_buffers) if specs else None
        own = tuple(layer for layer, _ in group)
        runs.append(LayerRun(own, stack, tuple(specs), last_norm is not None))
    return tuple(runs)


def _sequences(context: ForwardContext) -> tuple[list[int], list[int], list[int]]:
    """Return row, first slot and number of tokens of each sequence."""
    rows: list[int] = []
    starts: list[int] = []
    lengths: list[int] = []
    for one in context.segments:
        own = (
            range(len(context.embeds)) if one.rows is None else range(one.rows.start, one.rows.stop)
        )
        rows += own
        starts += one.starts(len(own))
        lengths += [one.length] * len(own)
    return rows, starts, lengths


def _nothing(context: ForwardContext) -> tuple[Tensor, ...]:
    return ()


def _pieces(layer: nn.Module) -> list[PartSpec] | None:
    # A subclass with another forward has to say again what it consists of.
    if not isinstance(layer, FusedLayer) or "part_specs" not in vars(type(layer)):
        return None
    return None if hooked(layer) else layer.part_specs()
