"""Copies of the host's numbers on a device, which nobody waits for."""

import torch
from torch import Tensor


def sent(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to a device without waiting."""
    return brought(torch.tensor(values, dtype=dtype, device="cpu"), device)


def brought(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host waits only where it is on another one."""
    # Memory of the host is read before this returns, so that it may be anybody's afterwards.
    return x.to(device, non_blocking=x.device.type == "cpu")
