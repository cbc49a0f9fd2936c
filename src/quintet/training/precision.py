"""The dtype in which a forward computes."""

from contextlib import AbstractContextManager, nullcontext

import torch

from quintet.training.optimizers.settings import Precision


def computing(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward: products in bfloat16 if the precision is "autocast"."""
    if precision == "autocast":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
