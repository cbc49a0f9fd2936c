"""Asynchronous copies from a device to the host."""

import torch
from torch import Tensor


class Fetched:
    """Copies of tensors on their way from a device.

    Args:
        tensors: all on one device, a CPU or another.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = tuple(x.to("cpu", non_blocking=True) for x in tensors)
        device = tensors[0].device
        self._arrival: torch.Event | None = None
        if device.type != "cpu":
            self._arrival = torch.Event(device)
            self._arrival.record()

    def read(self) -> tuple[Tensor, ...]:
        """Wait for these copies, and return them."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._copies
