"""Weights of which each process has a slice, and which are gathered for a layer when it runs.

PyTorch's FSDP2 does it, on plain modules: inside of a forward there are whole, plain parameters.
Gradients are summed, not averaged: what is minimised is divided by what all processes count.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from quintet.layers.moe import Experts
from quintet.parallel.world import World

T = TypeVar("T")

NONE: Mapping[str, tuple[int, ...]] = MappingProxyType({})


class Root(nn.Module):
    """The wrapper of a sharded model: gathers embedding and head during its forward.

    A training calls parts of a model rather than its forward, so that the model itself cannot tell
    when it begins to run and when it ends.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], T]) -> T:
        """Return the result of a call that runs the model."""
        return call()


def divide(
    model: nn.Module,
    layers: nn.ModuleList,
    world: World,
    *,
    low: bool,
    sliced: Mapping[str, tuple[int, ...]] = NONE,
    whole: frozenset[str] = frozenset(),
) -> Root:
    """Cut each parameter to this process's slice, and return the module that runs the model.

    Each layer is gathered by itself, its experts too; modules that several layers share, once and
    then kept; what lies outside of layers, as embedding, norm and head, from the forward to the end
    of the backward. Parameters of another dtype than most have stay whole.

    Experts that other processes with other batches have, too, are divided among those alone.

    Args:
        model: what is divided.
        layers: its layers.
        world: whose axis `fsdp` it is divided along; along `dp` there are copies.
        low: whether parameters are gathered in bfloat16; gradients are summed in float32.
        sliced: of parameters that are slices already, by their first names, what they are of.
        whole: parameters that stay whole.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    root, own = Root(model), _set_aside(model, sliced)
    policy = MixedPrecisionPolicy()
    if low:
        # What layers are given is in bfloat16 already, where it should be.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    kinds = Counter(p.dtype for name, p in model.named_parameters() if name not in whole)
    most = kinds.most_common(1)[0][0]
    apart = {p for name, p in model.named_parameters() if p.dtype != most or name in whole}
    given: dict[str, Any] = {"mp_policy": policy, "ignored_params": apart}
    stacks = [module for module in model.modules() if isinstance(module, Experts)]
    if world.degrees.ep > world.degrees.tp:
        if world.degrees.of("copies") > 1 or low:
            for stack in stacks:
                fully_shard(stack, mesh=_mesh(world, "copies"), **given)
        else:
            apart |= {p for module in stacks for p in module.parameters()}
        stacks = []
    if world.degrees.fsdp == 1:
        return _ready(root, own)
    given["mesh"] = _mesh(world, "fsdp")
    shared = _shared(layers)
    outer = set(_outside(model, layers))
    # Of layers in other processes there is nothing, or what several share.
    common = {p for module in shared for p in module.parameters()}
    units: list[nn.Module] = [
        *stacks,
        *(x for x in layers if not common.issuperset(x.parameters())),
    ]
    for module in shared:
        fully_shard(module, reshard_after_forward=False, **given)
    for module in units:
        # A prediction layer has the embedding, too, and is gathered with that.
        if outer.isdisjoint(module.parameters()):
            fully_shard(module, **given)
    fully_shard(root, reshard_after_forward=False, **given)
    return _ready(root, own)


def _ready(root: Root, own: Mapping[str, Tensor]) -> Root:
    """Return the model to run, with its slices in place and gradients that add up."""
    from torch.distributed.fsdp import FSDPModule

    _put_back(root.model, own)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # PREMUL_SUM, by which other factors are multiplied in, is unknown to gloo.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # Room for whole parameters is made once; made in inference mode, nothing could learn with it.
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
    return root


def _set_aside(model: nn.Module, sliced: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Take slices out of a model, and leave their parameters without memory in place."""
    parameters = {name: p for name, p in model.named_parameters() if name in sliced}
    wholes = {
        p: nn.Parameter(
            torch.empty(sliced[name], dtype=p.dtype, device="meta"), requires_grad=p.requires_grad
        )
        for name, p in parameters.items()
    }
    _replace(model, wholes)
    return {name: p.detach() for name, p in parameters.items()}


def _put_back(model: nn.Module, own: Mapping[str, Tensor]) -> None:
    """Give divided parameters their slices."""
    from torch.distributed.tensor import DTensor

    filled: dict[nn.Parameter, nn.Parameter] = {}
    for name, p in model.named_parameters():
        if name in own:
            assert isinstance(p, DTensor), name
            slice_of = DTensor.from_local(
                own[name],
                p.device_mesh,
                p.placements,
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )
            filled[p] = nn.Parameter(slice_of, requires_grad=p.requires_grad)
    _replace(model, filled)


def _replace(model: nn.Module, parameters: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the places of some, also where several modules share one."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in parameters:
                module._parameters[name] = parameters[parameter]


def _mesh(world: World, along: str) -> Any:
    """Return the mesh (dp, fsdp) of the processes that have the same part of the model.

    Of experts beyond tp it is (dp, copies).
    """
    from torch.distributed.device_mesh import DeviceMesh

    degrees, own = world.degrees, world.coordinates
    device = world.device.type
    if degrees.dp == 1:
        return DeviceMesh.from_group(world.groups[along], device, mesh_dim_names=(along,))
    same = ("pp", "cp", "tp") if along == "fsdp" else ("pp", "ep")
    rows: dict[int, dict[int, int]] = {}
    for rank in range(degrees.size):
        coordinates = degrees.coordinates(rank)
        if all(coordinates[axis] == own[axis] for axis in same):
            rows.setdefault(coordinates["dp"], {})[coordinates[along]] = rank
    ranks = [[row[i] for i in range(degrees.of(along))] for _, row in sorted(rows.items())]
    groups = [world.groups["dp"], world.groups[along]]
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("dp", along))


def _shared(layers: nn.ModuleList) -> list[nn.Module]:
    """Return the outermost modules with parameters that several layers have."""
    times = Counter(module for layer in layers for module in layer.modules())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for layer in layers:
        for module in layer.modules():
            if (
                times[module] > 1
                and module not in inside
                and any(True for _ in module.parameters())
            ):
                found.append(module)
                inside.update(module.modules())
    return found


def _outside(module: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Parameter]:
    """Yield the parameters that are reached without passing a layer."""
    if module is not layers:
        yield from module.parameters(recurse=False)
        for child in module.children():
            yield from _outside(child, layers)
