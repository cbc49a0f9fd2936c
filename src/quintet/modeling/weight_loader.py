"""Moves tensors from a checkpoint into a model on the meta device."""

import itertools
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from quintet.checkpoint import StackPiece, Weights
from quintet.errors import CheckpointError, InputError, UnsupportedBackendError
from quintet.layers.mamba2 import CausalConv1d
from quintet.modeling.core import ModelCore
from quintet.modeling.key_mapping import KeyMapping
from quintet.modeling.progress import progress_bar
from quintet.parallel.placement import Shard
from quintet.quantization import EncodedWeight, Slot, read

WHOLE: Mapping[str, Shard] = MappingProxyType({})


class WeightLoader:
    """Puts tensors into a model, one at a time.

    A tensor that comes as it is to be kept stays a view of the mapped file; every other is
    converted on its way, so that none is ever there twice. Of a model that several processes hold,
    only what this one has is looked at.

    Args:
        dtype: of what is not kept in float32.
        device_of: where the tensor of a name is to be.
        slots: what takes in the tensors of a name that are held quantised.

    Attributes:
        shards: what this process has of the tensor of a name; all, where it is not there.
        local_names: the names of the tensors that it has anything of; None for all.
        copies: whether no tensor stays a view of its file, because all will be written to.
    """

    copies = False
    shards: Mapping[str, Shard] = WHOLE
    local_names: Container[str] | None = None

    def __init__(
        self,
        model: ModelCore,
        dtype: torch.dtype,
        device_of: Callable[[str], torch.device],
        slots: Mapping[str, Slot],
    ) -> None:
        self.model, self.dtype, self.device_of, self.slots = model, dtype, device_of, slots
        self._tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))

    def share(self, name: str, piece: StackPiece) -> tuple[Shard, StackPiece] | None:
        """Return this process's share of a piece, and its place there; None for none.

        Without processes among which `name` is divided, that is all of it.
        """
        if self.local_names is not None and name not in self.local_names:
            return None
        shard = self.shards.get(name)
        if shard is None:
            return Shard(piece.shape, {}), piece
        if piece.place is None:
            return shard, replace(piece, shape=shard.local_shape)
        found = shard.piece(*piece.place)
        if found is None:
            return None
        own, place = found
        return own, replace(piece, shape=own.local_shape, place=place)

    def put(
        self, name: str, piece: StackPiece, weight: Tensor | EncodedWeight, *, mapped: bool
    ) -> bool:
        """Put a tensor into the model, and return whether its memory is referenced.

        Args:
            mapped: whether `weight` is a view of a file, whose parts can be kept by themselves.

        Raises:
            CheckpointError: its numbers mean nothing by themselves, or are not finite.
        """
        if isinstance(weight, Tensor):
            _check_dtype(piece.name, weight.dtype)
        dtype, device = self.dtype_of(name), self.device_of(name)
        found = self.share(name, piece)
        if found is None:
            return False
        share, own = found
        if name in self.slots:
            self.slots[name].take(weight, own.place, device, piece.name, share)
            return False
        if isinstance(weight, EncodedWeight):
            tensor = part = weight.numbers(share, dtype, piece.name)
        else:
            tensor, part = weight, share.of(weight)
        if own.place is None:
            placed = part.to(device, dtype).contiguous()
            shared = _share_memory(placed, tensor)
            if shared and (self.copies or not (share.whole or (mapped and tensor is weight))):
                # What the other processes have would stay with it.
                placed, shared = placed.clone(), False
            assign(self.model, name, placed)
            return shared and tensor is weight
        if self._tensors[name].is_meta:
            shape = self._tensors[name].shape
            self._tensors[name] = torch.empty(shape, dtype=dtype, device=device)
            assign(self.model, name, self._tensors[name])
        own.of(self._tensors[name]).copy_(part)
        return False

    def draw(self, names: tuple[str, ...], state: Tensor | None = None) -> None:
        """Initialise the modules that these tensors belong to.

        Args:
            state: of the generator, which several processes share; what they draw whole is the
                same, and each keeps its part.
        """
        if state is None:
            self._draw(names)
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            self._draw(names)

    def _draw(self, names: tuple[str, ...]) -> None:
        for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
            module = self.model.get_submodule(path)
            drawn = {}
            state = module.state_dict(keep_vars=True)
            for leaf, tensor in state.items():
                if "." in leaf:
                    continue
                name = f"{path}.{leaf}" if path else leaf
                shard = self.shards.get(name)
                shape = tensor.shape if shard is None else shard.shape
                # Generators of other devices are not shared.
                device = self.device_of(name) if shard is None else torch.device("cpu")
                assign(self.model, name, torch.empty(shape, device=device, dtype=torch.float32))
                drawn[name] = tensor
            if isinstance(module, CausalConv1d):
                # Its class draws it, and no model again.
                module.reset_parameters()
            self.model.init_module(module)
            tensors = module.state_dict(keep_vars=True)
            for name, before in drawn.items():
                whole, shard = tensors[name.rpartition(".")[2]].detach(), self.shards.get(name)
                if self.local_names is not None and name not in self.local_names:
                    assign(self.model, name, before.detach())
                    continue
                own = whole if shard is None else shard.of(whole)
                placed = own.to(self.device_of(name), self.dtype_of(name))
                if shard is not None and not shard.whole and _share_memory(placed, whole):
                    placed = placed.clone(memory_format=torch.contiguous_format)
                assign(self.model, name, placed.contiguous())

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor of the model."""
        return self.model.dtype_of(name, self.dtype)


def load_weights(
    loader: WeightLoader,
    mapping: KeyMapping,
    weights: Weights,
    where: str,
    state: Tensor | None = None,
) -> None:
    """Read the tensors that a model needs; for `state` see `WeightLoader.draw`.

    Raises:
        CheckpointError: a tensor cannot be read, or is there twice with different values.
    """
    if shapeless := [name for name in mapping.reshaped if name in loader.slots]:
        raise InputError(
            f"ignore_mismatched_sizes lets {', '.join(shapeless)} start from random weights, which "
            "cannot be trained where they are quantised; load without quantisation"
        )
    # Before reading: a head may be there in part, and what is read must stay.
    loader.draw(mapping.fresh, state)
    _check_aliases(loader, mapping, weights, where)
    own = {n: one for n, one in mapping.stored.items() if loader.share(*mapping.wanted[n])}
    files = {name: [file for file, _ in one.files.values()] for name, one in own.items()}
    sizes = {n: sum(weights.tensors[f].nbytes for f in fs) for n, fs in files.items()}
    with progress_bar("loading", sum(sizes.values())) as bar:
        for in_file, weight in read(weights, own):
            name, piece = mapping.wanted[in_file]
            if not loader.put(name, piece, weight, mapped=weights.mapped):
                for file in files[in_file]:
                    weights.forget(file)
            bar.update(sizes[in_file])


def check_filled(model: ModelCore) -> None:
    """Refuse a model whose weights a surrounding context removed.

    Raises:
        UnsupportedBackendError: it is one.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    if lost := [name for name, tensor in tensors if tensor.is_meta]:
        raise UnsupportedBackendError(
            f"{len(lost)} tensors ended without data, {lost[0]} among them: something around "
            "from_pretrained, such as accelerate's init_empty_weights, moves new parameters to "
            "meta; load without it, or build the model without weights by from_config"
        )


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer by name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        module.register_buffer(leaf, tensor)


def _check_aliases(loader: WeightLoader, mapping: KeyMapping, weights: Weights, where: str) -> None:
    """Refuse two names of one tensor with different values."""
    for second, first in mapping.aliases.items():
        shared = loader.share(*mapping.wanted[first])
        if shared is None:
            continue
        pair = {name: shared[0].of(tensor) for name, tensor in weights.read([first, second])}
        if not identical(pair[first], pair[second]):
            raise CheckpointError(
                f"{where}: {second} and {first} are one tensor of the model, and there with "
                "different values, of which one would be lost; if they are two, the config has "
                "to say so (tie_word_embeddings=False for an output head of its own)"
            )
        weights.forget(first)
        weights.forget(second)


def identical(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # By their bytes: numbers that are not finite are equal, too, and FP8 has no comparison.
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _check_dtype(name: str, saved: torch.dtype) -> None:
    if not saved.is_floating_point or saved.itemsize == 1:
        raise CheckpointError(
            f"{name} is stored as {saved}, which says nothing without the quantization_config that "
            "config.json lacks; use a copy of the model in bfloat16"
        )
