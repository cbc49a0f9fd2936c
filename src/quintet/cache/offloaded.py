"""Keys and values in host memory, for contexts too large for the accelerator."""

from dataclasses import replace

import torch
from torch import Tensor

from quintet.cache.base import Cache
from quintet.cache.dense import DynamicSlot, _slots
from quintet.cache.recurrent import RecurrentSlot
from quintet.cache.segment import Segment
from quintet.configuration.base import PreTrainedConfig


class OffloadedSlot(DynamicSlot):
    """Growing buffers on the CPU; a step's keys and values are copied to the device."""

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        start = segment.start.cpu() if isinstance(segment.start, Tensor) else segment.start
        counts = None if segment.counts is None else segment.counts.cpu()
        host = replace(segment, start=start, counts=counts, device=torch.device("cpu"))
        stored = super().update(keys.cpu(), values.cpu(), host)
        return stored[0].to(keys.device), stored[1].to(values.device)


class OffloadedCache(Cache):
    """A growing cache with one layer at a time on the device.

    The states of recurrent layers do not grow with the text and stay on the device.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(*_slots(config, OffloadedSlot, RecurrentSlot))
