"""Tensor and pipeline parallelism in `from_pretrained`."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError, shown
from quintet.folder import AdapterFolderError
from quintet.modeling import loading
from quintet.modeling.core import ModelCore
from quintet.modeling.init_on_meta import init_on_meta
from quintet.modeling.placement import DeviceMap, MaxMemory
from quintet.modeling.source import ModelSource
from quintet.parallel.division import DistributedConfig, degrees_for, processes
from quintet.parallel.launch import connect, join, own_device
from quintet.parallel.world import World


def world_for(
    cls: type[ModelCore],
    source: ModelSource | None,
    given: PreTrainedConfig | str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
    distributed: DistributedConfig,
    device_map: DeviceMap,
    max_memory: MaxMemory | None,
) -> World:
    """Join the other processes, and return which part of the model each holds.

    Raises:
        InputError: the model cannot be divided so, or an option says where weights go in a way
            that does not go with it.
        DistributedError: the others did not come.
    """
    if max_memory is not None:
        raise InputError("max_memory is for one process with several devices; leave it out")
    device = _device(device_map)
    connect(distributed.timeout, device)
    try:
        config = loading.config_of(cls, source, given, overrides)
    except AdapterFolderError as found:
        raise InputError(
            f"{found}: adapters are not put on a model that several processes hold; merge it "
            "first, in one process: merge_and_unload(), then save_pretrained(…)"
        ) from None
    degrees = degrees_for(init_on_meta(cls, config), distributed, processes())
    if distributed.expert_seats and degrees.ep == 1:
        raise InputError(
            "expert_seats say which process has which experts, and ep_size=1 gives all of them to "
            "each; set ep_size"
        )
    world = join(degrees, device=device, timeout=distributed.timeout)
    seats = {path: tuple(order) for path, order in (distributed.expert_seats or {}).items()}
    return replace(world, seats=seats)


def _device(device_map: DeviceMap) -> torch.device:
    if device_map is None or device_map == "auto":
        return own_device()
    if isinstance(device_map, str | torch.device) and str(device_map) in ("cpu", "cuda"):
        return own_device(str(device_map))
    raise InputError(
        f"device_map={shown(device_map)} says where one process puts a whole model; among several "
        'each has its own GPU, or the CPU: leave it out, or give "cpu" or "cuda"'
    )
