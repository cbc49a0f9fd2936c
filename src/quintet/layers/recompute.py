"""Activation checkpointing: run a layer again in the backward pass."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from quintet.errors import InputError
from quintet.layers.adapted import placed
from quintet.layers.context import ForwardContext
from quintet.layers.router import Choices

# Those of `torch.utils.checkpoint.checkpoint`; the first alone serve both of its ways.
OPTIONS = ("preserve_rng_state", "use_reentrant", "context_fn", "determinism_check", "debug")
BOTH_WAYS = OPTIONS[:2]


@dataclass(frozen=True)
class Recompute:
    """The settings of activation checkpointing.

    Attributes:
        options: of `torch.utils.checkpoint.checkpoint`.
        every_n_layers: recompute the first of so many layers, and keep what the others need.
        offload: hold what layers are given in the host's memory until the backward pass.

    Raises:
        InputError: an option that does not exist, or that the reentrant way does not have.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    every_n_layers: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise InputError(
                f"options of checkpointing are a {type(self.options).__name__}; give a mapping, "
                'as {"use_reentrant": False}'
            )
        known = BOTH_WAYS if self.reentrant else OPTIONS
        for name in self.options:
            if name not in known:
                way = f"use_reentrant={self.reentrant}"
                raise InputError(
                    f"checkpointing with {way} has no option {name!r}; it has {', '.join(known)}, "
                    "and beside them every_n_layers and offload"
                )
        n = self.every_n_layers
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise InputError(f"every_n_layers={n!r} has to be an integer of at least 1")
        for name, flag in (("offload", self.offload), ("use_reentrant", self.reentrant)):
            if not isinstance(flag, bool):
                raise InputError(f"{name}={flag!r} has to be True or False")

    @property
    def reentrant(self) -> bool:
        """Whether `torch.utils.checkpoint` runs in its reentrant form."""
        return self.options.get("use_reentrant", False)  # type: ignore[no-any-return]

    def for_layer(self, index: int) -> "Recompute | None":
        """Return the settings for a layer, or None if it is not recomputed."""
        return self if index % self.every_n_layers == 0 else None

    def run(
        self,
        layer: nn.Module,
        hidden: Tensor,
        context: ForwardContext,
        tensors: Mapping[str, Tensor],
    ) -> Any:
        """Apply a layer to (B, T, C) and more, and keep its notes."""
        weighed: list[int] = []
        # A compiled program chooses once, and keeps or recomputes what its compiler decides.
        choices = None if torch.compiler.is_compiling() else Choices()

        def noting(hidden: Tensor, embeds: Tensor, *others: Tensor) -> tuple[Any, ...]:
            # Notes of its own, so that no second run adds to those of the first.
            notes = context.notes.like()
            notes.choices = None if choices is None else choices.again()
            named = dict(zip(tensors, others, strict=True))
            own = replace(context, embeds=embeds, notes=notes)
            with placed(context.placing):
                output = layer(hidden, context=own, **named)
            weights = notes.weights or ()
            weighed.append(len(weights))
            return output, *weights, *(notes.router_logits or ())

        # The reentrant way knows no tensors but those it gives and gets.
        output, *noted = self._checkpointed(noting, hidden, context.embeds, *tensors.values())
        for weights in noted[: weighed[0]]:
            context.notes.note_weights(weights)
        for logits in noted[weighed[0] :]:
            context.notes.note_routing(logits)
        return output

    def _checkpointed(
        self, noting: Callable[..., tuple[Any, ...]], hidden: Tensor, *others: Tensor
    ) -> tuple[Any, ...]:
        saved_tensors: AbstractContextManager[Any] = nullcontext()
        if self.offload:
            saved_tensors = save_on_cpu(pin_memory=torch.cuda.is_available())
        with saved_tensors:
            if self.reentrant:
                output = checkpoint(noting, hidden, *others, **self.options)
            else:
                # The embeddings are one tensor for all layers: not to be offloaded with each.
                options = {"use_reentrant": False, **self.options}
                output = checkpoint(lambda x: noting(x, *others), hidden, **options)
        return output  # type: ignore[no-any-return]
