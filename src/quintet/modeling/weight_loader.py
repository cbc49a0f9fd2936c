"""Data goes from a checkpoint into a model that was built without memory."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quintet.checkpoint import Piece, Weights
from quintet.errors import CheckpointError, InputError
from quintet.modeling.core import ModelCore
from quintet.modeling.key_mapping import KeyMapping
from quintet.modeling.progress import progress_bar
from quintet.quantization import Encoded, Slot, read

__all__ = ["WeightLoader", "identical", "load_weights"]


class WeightLoader:
    """Puts tensors into their places, each as it comes.

    A tensor that comes whole and as it is to be kept stays a view of the mapped file; every other
    is converted on its way, so that none is ever there twice.

    Args:
        dtype: of what is not kept in float32.
        device_of: where the tensor of a name is to be.
        slots: what takes in the tensors of a name that are held quantised.
    """

    def __init__(
        self,
        model: ModelCore,
        dtype: torch.dtype,
        device_of: Callable[[str], torch.device],
        slots: Mapping[str, Slot],
    ) -> None:
        self.model, self.dtype, self.device_of, self.slots = model, dtype, device_of, slots
        self._tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))

    def put(self, name: str, piece: Piece, weight: Tensor | Encoded) -> bool:
        """Put a tensor of the checkpoint where it belongs, and tell whether its memory is kept.

        Raises:
            CheckpointError: its numbers mean nothing by themselves, or are not finite.
        """
        if isinstance(weight, Tensor):
            _check_dtype(piece.name, weight.dtype)
        dtype, device = self.dtype_of(name), self.device_of(name)
        if name in self.slots:
            self.slots[name].take(weight, piece.place, device, piece.name)
            return False
        tensor = weight.decode(dtype) if isinstance(weight, Encoded) else weight
        if piece.place is None:
            placed = tensor.to(device, dtype)
            assign(self.model, name, placed)
            return placed is weight
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
        """Return the dtype of a tensor of the model."""
        return torch.float32 if name.endswith(self.model.keep_in_fp32) else self.dtype


def load_weights(loader: WeightLoader, mapping: KeyMapping, weights: Weights, where: str) -> None:
    """Read what a model needs and put it into place.

    Raises:
        CheckpointError: a tensor cannot be read, or is there twice with different values.
    """
    if shapeless := [name for name in mapping.reshaped if name in loader.slots]:
        raise InputError(
            f"ignore_mismatched_sizes lets {', '.join(shapeless)} start from random weights, which "
            "cannot be trained where they are quantised; load without quantisation"
        )
    # Before reading: a head may be there in part, and what is read must stay.
    loader.draw(mapping.fresh)
    _check_aliases(mapping.aliases, weights, where)
    files = {name: [file for file, _ in one.files.values()] for name, one in mapping.stored.items()}
    sizes = {n: sum(weights.tensors[f].nbytes for f in fs) for n, fs in files.items()}
    with progress_bar("loading", sum(sizes.values())) as bar:
        for in_file, weight in read(weights, mapping.stored):
            name, piece = mapping.wanted[in_file]
            if not loader.put(name, piece, weight):
                for file in files[in_file]:
                    weights.forget(file)
            bar.update(sizes[in_file])


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
        if not identical(pair[first], pair[second]):
            raise CheckpointError(
                f"{where}: {second} and {first} are one tensor of the model, and there with "
                "different values, of which one would be lost; if they are two, the config has "
                "to say so (tie_word_embeddings=False for an output head of its own)"
            )
        weights.forget(first)
        weights.forget(second)


def identical(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # By their bytes: numbers that are not finite are equal, too, and FP8 has no comparison.
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def _check_dtype(name: str, saved: torch.dtype) -> None:
    if not saved.is_floating_point or saved.itemsize == 1:
        raise CheckpointError(
            f"{name} is stored as {saved}, which says nothing without the quantization_config that "
            "config.json lacks; use a copy of the model in bfloat16"
        )
