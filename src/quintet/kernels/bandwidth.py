"""Reading memory, and nothing else."""

import torch
from torch import Tensor

from quintet.kernels.calls import begin


def read(x: Tensor) -> Tensor | None:
    """Return the sum of x (N,) in float32, read in wide loads by all threads; None without it."""
    call = begin()
    if call is None:
        return None
    count = x.numel()
    call.integers(count)
    call.packed(x, torch.float32, count)
    total = call.output(x)
    return total if call.run("read_f32") else None
