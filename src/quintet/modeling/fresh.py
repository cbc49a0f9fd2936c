"""Random initialisation of a sharded model, one module at a time."""

from typing import TypeVar

import torch

from quintet.configuration.base import PreTrainedConfig
from quintet.modeling.core import ModelCore
from quintet.modeling.init_on_meta import init_on_meta
from quintet.modeling.own_part import OwnPart
from quintet.modeling.weight_loader import WeightLoader, check_filled
from quintet.parallel.slices import ParameterSlices
from quintet.parallel.world import World

Model = TypeVar("Model", bound=ModelCore)


def new_model(
    cls: type[Model],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    world: World | None = None,
    slices: ParameterSlices | None = None,
) -> Model:
    """Build a model with random weights, drawn in float32 module by module.

    The numbers follow from where the generator is alone: each process draws all of them, and keeps
    its part. They are others than those of a model that is made by its class, which draws some
    twice.

    Args:
        cls: its class.
        config: its config.
        dtype: of what is not kept in float32.
        world: the processes that have it together; all of them have to call this.
        slices: which rows of its part of each parameter this process has; None for all.

    Raises:
        InputError: it cannot be divided so.
    """
    model = init_on_meta(cls, config)
    own = None if world is None else OwnPart(model, world, dtype, slices)
    device = torch.device("cpu") if world is None else world.device
    loader = WeightLoader(model, dtype, lambda name: device, {})
    if own is not None:
        loader.shards, loader.local_names = own.shards, own.local_names
    # What several modules share has the first of its names.
    first = {
        id(tensor): name for name, tensor in reversed(model.state_dict(keep_vars=True).items())
    }
    with torch.inference_mode(False):
        loader.draw(tuple(reversed(first.values())))
        model.tie_weights()
    if own is not None:
        own.finish(model)
    check_filled(model)
    model.config.dtype = str(dtype).removeprefix("torch.")
    return model
