"""Runs a model's layers one after another: called, recomputed, or fused on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from quintet.cache import Cache
from quintet.layers.context import ForwardContext
from quintet.layers.running import run_layer
from quintet.layers.stack import FusedRuns, LayerRun, fits, gather
from quintet.modeling.base import PreTrainedModel
from quintet.ops.ragged import Padding


class LayerStack(PreTrainedModel):
    """Decoder layers and a final norm."""

    layers: nn.ModuleList
    norm: nn.Module

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last layer (overridden by a family that names it differently)."""
        return self.norm

    @contextmanager
    def fused_session(self, cache: Cache | None) -> Iterator[None]:
        """Collect the layers' weights for the fused step once, for all steps inside.

        Where layers run in one call (`quintet.layers.stack`), gathering what they hold takes longer
        than all else that is not computing. It is kept with the cache, which belongs to one
        generation as no model does; each step looks whether anything was changed since.
        """
        if cache is not None:
            cache.in_fused_session = True
        try:
            yield
        finally:
            if cache is not None:
                cache.in_fused_session, cache.fused_runs = False, None

    # -- the steps of forward ----------------------------------------------------------------

    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _run_layers(
        self, hidden: Tensor, context: ForwardContext, rows: Padding | None, keeps: bool
    ) -> list[Tensor]:
        """Return [embeddings, outputs of the layers, last one normalised], in columns.

        Or that one alone, as nothing should hold on to the others where nobody asked.
        """
        states = []
        runs: tuple[LayerRun, ...] = (LayerRun(self._own_layers()),)
        routes = context.notes.router_logits is not None
        if not keeps and not routes and not torch.compiler.is_compiling() and fits(hidden, context):
            runs = self._gathered(context.cache)
        normalised, index = False, 0
        for run in runs:
            fused = run.run_fused(hidden, context)
            if fused is not None:
                hidden, normalised = fused, run.normalises
                continue
            for layer in run.layers:
                if keeps:
                    # What is returned is what the next layer reads, so that gradients pass it.
                    states.append(hidden if rows is None else rows.unpack(hidden))
                    hidden = states[-1] if rows is None else rows.pack(states[-1])
                hidden = self._run_layer(layer, index, hidden, context)
                index += 1
        last = hidden if normalised else self.final_norm(hidden)
        return [*states, last if rows is None else rows.unpack(last)]

    def _gathered(self, cache: Cache | None) -> tuple[LayerRun, ...]:
        layers, norm, C = self._own_layers(), self.final_norm, self.config.hidden_size
        if cache is None or not cache.in_fused_session:
            return gather(layers, norm, C, self.dtype)
        fused = cache.fused_runs
        if not isinstance(fused, FusedRuns) or not fused.serves(layers, norm):
            # Whether gradients are recorded is asked at every step.
            with torch.no_grad():
                cache.fused_runs = fused = FusedRuns(gather(layers, norm, C, self.dtype), norm)
        return fused.runs

    def _own_layers(self) -> tuple[nn.Module, ...]:
        # A family may keep further layers behind, which are no part of a run.
        return tuple(islice(self.layers, self.config.num_hidden_layers))

    def _run_layer(
        self, layer: nn.Module, index: int, hidden: Tensor, context: ForwardContext, **more: Tensor
    ) -> Tensor:
        # A cache would be written twice, so with one nothing is recomputed.
        if context.placing is not None:
            context = replace(context, placing=context.placing.at_layer(index))
        recompute = None
        if (context.cache is None or context.cache.keeps_nothing) and self._recomputes():
            recompute = self.recompute.for_layer(index)
        return run_layer(layer, hidden, context, recompute, **more)
