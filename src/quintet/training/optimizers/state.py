"""The state of an optimiser as named tensors: saved and taken over to the bit."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quintet.errors import CheckpointError, listed
from quintet.training.optimizers.muon import Muon


def materialised(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state it has before its first step, so that all is there to save."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if isinstance(optimizer, Muon):
                optimizer.state[p] = {"momentum": torch.zeros_like(p)}
            else:
                optimizer.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


@torch.no_grad()
def copy_into(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names.

    Raises:
        CheckpointError: the names, shapes or dtypes are not the same; nothing was changed then.
    """
    wrong = [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{name} has no place" for name in given if name not in own]
    wrong += [
        f"{name} is {_kind(given[name])}, not {_kind(tensor)}"
        for name, tensor in own.items()
        if name in given and _kind(given[name]) != _kind(tensor)
    ]
    if wrong:
        raise CheckpointError(
            "the state of the optimisers is of another model, or of other settings:\n"
            f"{listed(wrong)}\n"
            "resume with the model, the groups and the precision it was saved with, or start anew"
        )
    for name, tensor in own.items():
        tensor.copy_(given[name])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
