"""Decides whether cached tensors may be written in place."""

import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.ops.transforms import transformed


def writable(buffer: Tensor, *new: Tensor) -> bool:
    """Return whether tensors can be written in place into one a cache holds.

    Not where a graph of autograd may hold on to it or to them, where it was made in inference mode,
    which forbids that outside of it, or where what is new has an axis or a tangent of `torch.func`.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in new)
    return not (learns or buffer.requires_grad or locked(buffer) or transformed())


def locked(buffer: Tensor) -> bool:
    """Return whether a tensor is an inference tensor used outside inference mode."""
    # Compiled code cannot ask.
    if torch.compiler.is_compiling():
        return False
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def own(buffer: Tensor) -> Tensor:
    """Return a tensor that may be written in place: itself, or a copy."""
    return buffer if writable(buffer) else buffer.clone()


def check_alike(name: str, cached: Tensor, new: Tensor, *axes: int) -> None:
    """Check that new tensors match the size and device of a cache's.

    Args:
        name: of the tensors, for the message.
        cached: the cache's tensor.
        new: the tensor to add.
        axes: the axes that have to be as large.

    Raises:
        InputError: `new` has other sizes, or is on another device.
    """
    if cached.device != new.device or any(cached.shape[axis] != new.shape[axis] for axis in axes):
        raise InputError(
            f"the cache holds {name} {_described(cached, axes)}, and the model makes "
            f"{_described(new, axes)}; use the cache of this model, as it is now"
        )


def _described(x: Tensor, axes: tuple[int, ...]) -> str:
    return f"of {' x '.join(str(x.shape[axis]) for axis in axes)} on {x.device}"
