"""One decoder layer, called: what it returns is checked, and recomputed where that is asked for."""

from dataclasses import replace

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quintet.errors import InputError
from quintet.layers.step import Notes, Step

__all__ = ["run_layer"]


def run_layer(
    layer: nn.Module, hidden: Tensor, step: Step, *, recomputes: bool, **more: Tensor
) -> Tensor:
    """Return what a layer makes of (B, T, C), and note what else it tells.

    Args:
        more: what else this layer is given, by name.
        recomputes: run it again in the backward pass, in place of keeping what that needs.

    Raises:
        InputError: a hook, or what somebody put in its place, returned something else.
    """
    if recomputes:
        made, noted = checkpoint(_noting, layer, hidden, step, more, use_reentrant=False)
        step.notes.extend(noted)
    else:
        made = layer(hidden, step=step, **more)
    if not isinstance(made, Tensor):
        raise InputError(
            f"a {type(layer).__name__} returned a {type(made).__name__}, by a hook on it or by "
            f"what replaced it; a layer returns one tensor, hidden states {tuple(hidden.shape)}"
        )
    return made


def _noting(
    layer: nn.Module, hidden: Tensor, step: Step, more: dict[str, Tensor]
) -> tuple[Tensor, Notes]:
    """Run a layer with notes of its own, so that no second run adds to those of the first."""
    notes = step.notes.like()
    return layer(hidden, step=replace(step, notes=notes), **more), notes
