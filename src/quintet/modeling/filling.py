"""Data goes from a checkpoint into a model that was built without memory."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quintet.checkpoint import Piece, Weights
from quintet.errors import CheckpointError
from quintet.modeling.naming import Naming
from quintet.modeling.progress import Progress

if TYPE_CHECKING:
    from quintet.modeling.base import PreTrainedModel

__all__ = ["Filler", "fill"]


class Filler:
    """Puts tensors into their places, each as it comes.

    A tensor that comes whole and as it is to be kept stays a view of the mapped file; every other
    is converted on its way, so that none is ever there twice.

    Args:
        dtype: of what is not kept in float32.
        device_of: where the tensor of a name is to be.
    """

    def __init__(
        self, model: "PreTrainedModel", dtype: torch.dtype, device_of: Callable[[str], torch.device]
    ) -> None:
        self.model, self.dtype, self.device_of = model, dtype, device_of
        self._tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))

    def put(self, name: str, piece: Piece, tensor: Tensor) -> bool:
        """Put a tensor of the checkpoint where it belongs, and tell whether its memory is kept.

        Raises:
            CheckpointError: its numbers mean nothing by themselves.
        """
        dtype, device = self.stored_dtype(name, piece, tensor.dtype), self.device_of(name)
        if piece.place is None:
            placed = tensor.to(device, dtype)
            assign(self.model, name, placed)
            return placed is tensor
        if self._tensors[name].is_meta:
            shape = self._tensors[name].shape
            self._tensors[name] = torch.empty(shape, dtype=dtype, device=device)
            assign(self.model, name, self._tensors[name])
        piece.of(self._tensors[name]).copy_(tensor)
        return False

    def draw(self, names: tuple[str, ...]) -> None:
        """Draw fresh weights for the modules that these tensors are of."""
        for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
            module = self.model.get_submodule(path)
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                name = f"{path}.{leaf}" if path else leaf
                empty = torch.empty_like(
                    parameter, dtype=self.dtype_of(name), device=self.device_of(name)
                )
                assign(self.model, name, empty)
            self.model.init_module(module)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return what a tensor of the model is kept in."""
        return torch.float32 if name.endswith(self.model.keep_in_fp32) else self.dtype

    def stored_dtype(self, name: str, piece: Piece, saved: torch.dtype) -> torch.dtype:
        """Return what a tensor that was saved in a dtype is kept in.

        Raises:
            CheckpointError: its numbers mean nothing by themselves.
        """
        if not saved.is_floating_point or saved.itemsize == 1:
            raise CheckpointError(
                f"{piece.name} is stored as {saved}, which a weight of a model that is not "
                "quantised cannot be; use a copy of the model in bfloat16"
            )
        return self.dtype_of(name)


def fill(filler: Filler, naming: Naming, weights: Weights, where: str) -> None:
    """Read what a model needs and put it into place.

    Raises:
        CheckpointError: a tensor cannot be read, or is there twice with different values.
    """
    # Before reading: a head may be there in part, and what is read must stay.
    filler.draw(naming.fresh)
    _check_aliases(naming.aliases, weights, where)
    sizes = {name: weights.tensors[name].nbytes for name in naming.wanted}
    progress = Progress("loading", sum(sizes.values()))
    try:
        for in_file, tensor in weights.read(naming.wanted):
            name, piece = naming.wanted[in_file]
            if not filler.put(name, piece, tensor):
                weights.forget(in_file)
            progress.add(sizes[in_file])
    finally:
        progress.close()


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        module.register_buffer(leaf, tensor)


def _check_aliases(aliases: Mapping[str, str], weights: Weights, where: str) -> None:
    """Refuse two names of one tensor of the model that hold different values."""
    for second, first in aliases.items():
        pair = dict(weights.read([first, second]))
        if not torch.equal(pair[first], pair[second]):
            raise CheckpointError(
                f"{where}: {second} and {first} are one tensor of the model, and there with "
                "different values, of which one would be lost; if they are two, the config has "
                "to say so (tie_word_embeddings=False for an output head of its own)"
            )
        weights.forget(first)
        weights.forget(second)
