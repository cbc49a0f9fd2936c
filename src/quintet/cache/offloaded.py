"""Keys and values in the memory of the host, for texts that the accelerator has no room for."""

from dataclasses import replace

import torch
from torch import Tensor

from quintet.cache.base import Cache
from quintet.cache.dense import DynamicSlot, _slots
from quintet.cache.recurrent import RecurrentSlot
from quintet.cache.segment import Segment
from quintet.configuration.base import PreTrainedConfig


class OffloadedSlot(DynamicSlot):
    """Growing buffers on the CPU; what a step attends to is on the device of its tokens."""

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """Store a segment's (B, K, T, D) and return all (B, K, S, D) its rows have to attend to."""
        start = segment.start.cpu() if isinstance(segment.start, Tensor) else segment.start
        counts = None if segment.counts is None else segment.counts.cpu()
        host = replace(segment, start=start, counts=counts, device=torch.device("cpu"))
        held = super().update(keys.cpu(), values.cpu(), host)
        return held[0].to(keys.device), held[1].to(values.device)


class OffloadedCache(Cache):
    """A growing cache that is on the device for one layer at a time.

    The states of recurrent layers do not grow with the text and stay on the device.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(*_slots(config, OffloadedSlot, RecurrentSlot))
