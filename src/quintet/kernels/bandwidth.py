"""Measures memory bandwidth by reading."""

import torch
from torch import Tensor

from quintet.kernels.calls import begin


def read(x: Tensor) -> Tensor | None:
    """Sum x (N,) in float32 with wide loads on all threads; None without the library."""
    call = begin()
    if call is None:
        return None
    count = x.numel()
    call.integers(count)
    call.packed(x, torch.float32, count)
    total = call.output(x)
    return total if call.run("read_f32") else None
