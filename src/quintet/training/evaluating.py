"""Evaluates a model during its training without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation; afterwards its modules' modes and all randomness are as before.

    A `BiasBalancer` counts what passes routers in training mode alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
