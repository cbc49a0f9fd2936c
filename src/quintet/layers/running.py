"""One decoder layer, called: what it returns is checked, and recomputed where that is asked for."""

from torch import Tensor, nn

from quintet.errors import InputError
from quintet.layers.recompute import Recompute
from quintet.layers.step import Step

__all__ = ["run_layer"]


def run_layer(
    layer: nn.Module,
    hidden: Tensor,
    step: Step,
    recompute: Recompute | None = None,
    **more: Tensor,
) -> Tensor:
    """Return what a layer makes of (B, T, C), and note what else it tells.

    Args:
        recompute: how to run it again in the backward pass, in place of keeping what that needs.
        more: what else this layer is given, by name.

    Raises:
        InputError: a hook, or what somebody put in its place, returned something else.
    """
    if recompute is None:
        made = layer(hidden, step=step, **more)
    else:
        made = recompute.run(layer, hidden, step, more)
    if not isinstance(made, Tensor):
        raise InputError(
            f"a {type(layer).__name__} returned a {type(made).__name__}, by a hook on it or by "
            f"what replaced it; a layer returns one tensor, hidden states {tuple(hidden.shape)}"
        )
    return made
