"""Whether what a cache holds may be written in place, or somebody else may need it as it is."""

import torch
from torch import Tensor

from quintet.ops.transforms import transformed

__all__ = ["locked", "own", "writable"]


def writable(held: Tensor, *new: Tensor) -> bool:
    """Tell whether tensors can be written into one that a cache holds.

    Not where a graph of autograd may hold on to it or to them, where it was made in inference mode,
    which forbids that outside of it, or where what is new has an axis or a tangent of `torch.func`.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in new)
    return not (learns or held.requires_grad or locked(held) or transformed())


def locked(held: Tensor) -> bool:
    """Tell whether a tensor was made in inference mode and is used outside of it."""
    # Compiled code cannot ask.
    if torch.compiler.is_compiling():
        return False
    return held.is_inference() and not torch.is_inference_mode_enabled()


def own(held: Tensor) -> Tensor:
    """Return a tensor that may be written in place: what is held, or a copy of it."""
    return held if writable(held) else held.clone()
