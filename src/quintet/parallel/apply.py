"""A model becomes this process's part of it: smaller parameters, and hooks where tensors pass."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quintet.kernels.shared_buffer import SharedBuffer
from quintet.layers.mamba2 import GatedRMSNorm
from quintet.layers.plain import Idle, Summing
from quintet.parallel.experts import connect_experts
from quintet.parallel.norms import SpreadNorm
from quintet.parallel.placement import Shard, check_cut, place, seated, table_of
from quintet.parallel.regions import copied, reduced
from quintet.parallel.shared_buffer import shared_buffer_of
from quintet.parallel.stage import leave_out
from quintet.parallel.stages import Stages, stages_of
from quintet.parallel.vocabulary import connect_vocabulary
from quintet.parallel.world import World
from quintet.sharding import Sharding

Sliced = Callable[[nn.Module, Mapping[str, Shard], Sharding], dict[str, Shard]]


def shards_of(model: nn.Module, sharding: Sharding, world: World) -> dict[str, Shard]:
    """Describe this process's part of each saved tensor of a whole model, by all its names.

    Raises:
        InputError: units cannot be given out evenly, or the table says nothing of a tensor.
    """
    saved = model.state_dict(keep_vars=True)
    # Tables know what several share by its first name.
    first: dict[int, str] = {}
    for name, tensor in saved.items():
        first.setdefault(id(tensor), name)
    shapes = {name: tuple(saved[name].shape) for name in first.values()}
    found = place(shapes, sharding, world.place)
    return {name: found[first[id(tensor)]] for name, tensor in saved.items()}


def cut(model: nn.Module, shards: dict[str, Shard]) -> None:
    """Cut a whole model to this process's part; without memory as with it."""
    # What several share under several names stays one.
    own: dict[int, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = {n: (shard, parameters[n]) for n, shard in shards.items() if n in parameters}
    for shard, parameter in named.values():
        if not shard.whole:
            part = shard.of(parameter.detach())
            local = part if part.is_meta else part.clone(memory_format=torch.contiguous_format)
            own[id(parameter)] = nn.Parameter(local, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for leaf, tensor in module._parameters.items():
            if tensor is not None and id(tensor) in own:
                module._parameters[leaf] = own[id(tensor)]  # type: ignore[assignment]
    for name, shard in shards.items():
        if name not in named and not shard.whole:
            path, _, leaf = name.rpartition(".")
            module, buffer = model.get_submodule(path), model.get_buffer(name)
            # Not again where a module has several names.
            if tuple(buffer.shape) == shard.shape:
                module._buffers[leaf] = shard.of(buffer).clone()


def connect(model: nn.Module, sharding: Sharding, world: World) -> None:
    """Install the communication hooks of a cut model."""
    connect_experts(model, sharding, world)
    group = world.groups.get("tp")
    if group is None:
        return
    for name in sharding.spread:
        norm = model.get_submodule(name)
        assert isinstance(norm, GatedRMSNorm)
        if norm.weight.shape[0] < norm.group_size:
            vars(norm)["forward"] = SpreadNorm(norm, group, *world.place.tp)
    hooks = Entering(group), _Copy(group), Reducing(group)
    for name in sharding.copies:
        model.get_submodule(name).register_forward_pre_hook(hooks[0], with_kwargs=True)
    for name in sharding.copies_output:
        model.get_submodule(name).register_forward_hook(hooks[1])
    for name in sharding.reduces:
        model.get_submodule(name).register_forward_hook(hooks[2])
    connect_vocabulary(model, sharding.vocabulary, world)


def divide(
    model: nn.Module, world: World, sliced: Sliced | None = None, table: Sharding | None = None
) -> tuple[Sharding, dict[str, Shard]]:
    """Cut a whole model to this process's part; return the table, and the shards by name.

    Args:
        model: the whole, with or without memory.
        world: the processes.
        sliced: what is left of what this process would have, if that is sliced further.
        table: how it is cut, if its layers do not say all of it.

    Raises:
        InputError: units cannot be given out evenly, a table is missing, or cuts too little.
    """
    sharding = seated(table or table_of(model), world.seats, world.degrees.ep)
    shards = shards_of(model, sharding, world)
    if "tp" in world.groups:
        check_cut({name: shards[name] for name, _ in model.named_parameters()})
    if sliced is not None:
        shards = sliced(model, shards, sharding)
    cut(model, shards)
    return sharding, shards


def shard_model(
    model: nn.Module, world: World, stages: Stages | None = None, table: Sharding | None = None
) -> Sharding:
    """Make a whole model this process's part of it, and return the table it was cut by.

    Args:
        model: the whole.
        world: the processes.
        stages: which layers each has; None for one stage each, by what they cost, the
            last in the first process.
        table: how it is cut, if its layers do not say all of it.

    Raises:
        InputError: units cannot be given out evenly, a table is missing, or cuts too little; or
            there are more stages than layers.
    """
    stages = stages or stages_of(model, world.degrees.pp, backwards=True)
    sharding, _ = divide(model, world, table=table)
    connect(model, sharding, world)
    if world.degrees.pp > 1:
        leave_out(model, stages, world)
    return sharding


def _map_tensors(value: Any, apply: Callable[[Tensor], Tensor]) -> Any:
    """Apply to a tensor, or to the floating-point tensors of a tuple."""
    if isinstance(value, Tensor):
        return apply(value) if value.is_floating_point() else value
    if isinstance(value, tuple):
        items: Iterable[Any] = (_map_tensors(item, apply) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


# Objects, not closures: what they hold can be seen.


@dataclass(frozen=True, slots=True)
class Entering(Idle):
    """A hook that lets a module's arguments pass f."""

    group: dist.ProcessGroup

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments."""

        def enter(x: Tensor) -> Tensor:
            return copied(x, self.group)

        named = {name: _map_tensors(value, enter) for name, value in kwargs.items()}
        return tuple(_map_tensors(arg, enter) for arg in args), named


@dataclass(frozen=True, slots=True)
class _Copy(Idle):
    """A hook that lets a module's output pass f."""

    group: dist.ProcessGroup

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return _map_tensors(output, lambda x: copied(x, self.group))


@dataclass(frozen=True, slots=True)
class Reducing(Summing):
    """A hook that lets a module's output pass g."""

    group: dist.ProcessGroup

    def shared_buffer(self) -> SharedBuffer | None:
        """Return the shared buffer of the processes, or None."""
        return shared_buffer_of(self.group)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the sum."""
        return _map_tensors(output, lambda x: reduced(x, self.group))
