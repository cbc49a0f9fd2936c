"""Decides whether cached tensors may be written in place."""

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.ops.transforms import transformed


def writable(held: Tensor, *new: Tensor) -> bool:
    """Return whether tensors can be written in place into one a cache holds.

    Not where a graph of autograd may hold on to it or to them, where it was made in inference mode,
    which forbids that outside of it, or where what is new has an axis or a tangent of `torch.func`.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in new)
    return not (learns or held.requires_grad or locked(held) or transformed())


def locked(held: Tensor) -> bool:
    """Return whether a tensor is an inference tensor used outside inference mode."""
    # Compiled code cannot ask.
    if torch.compiler.is_compiling():
        return False
    return held.is_inference() and not torch.is_inference_mode_enabled()


def own(held: Tensor) -> Tensor:
    """Return a tensor that may be written in place: itself, or a copy."""
    return held if writable(held) else held.clone()


def check_alike(what: str, held: Tensor, new: Tensor, *axes: int) -> None:
    """Check that new tensors match the size and device of a cache's.

    Args:
        what: they are called.
        held: by the cache.
        new: to be added.
        axes: that have to be as large.

    Raises:
        InputError: it has other sizes, or is elsewhere.
    """
    if held.device != new.device or any(held.shape[axis] != new.shape[axis] for axis in axes):
        raise InputError(
            f"the cache holds {what} {_described(held, axes)}, and the model makes "
            f"{_described(new, axes)}; use the cache of this model, as it is now"
        )


def _described(x: Tensor, axes: tuple[int, ...]) -> str:
    return f"of {' x '.join(str(x.shape[axis]) for axis in axes)} on {x.device}"
