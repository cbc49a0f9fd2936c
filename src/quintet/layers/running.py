"""Calls one decoder layer: recomputed if requested, its output checked."""

from torch import Tensor, nn

from quintet.errors import InputError
from quintet.layers.adapted import placed
from quintet.layers.context import ForwardContext
from quintet.layers.recompute import Recompute


def run_layer(
    layer: nn.Module,
    hidden: Tensor,
    context: ForwardContext,
    recompute: Recompute | None = None,
    **more: Tensor,
) -> Tensor:
    """Apply a layer to (B, T, C), and collect its notes.

    Args:
        recompute: how to run it again in the backward pass, in place of keeping what that needs.
        more: what else this layer is given, by name.

    Raises:
        InputError: a hook, or what somebody put in its place, returned something else.
    """
    if recompute is None:
        with placed(context.placing):
            output = layer(hidden, context=context, **more)
    else:
        output = recompute.run(layer, hidden, context, more)
    if not isinstance(output, Tensor):
        raise InputError(
            f"a {type(layer).__name__} returned a {type(output).__name__}, by a hook on it or by "
            f"what replaced it; a layer returns one tensor, hidden states {tuple(hidden.shape)}"
        )
    return output
