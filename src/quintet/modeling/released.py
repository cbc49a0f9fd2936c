"""State dicts with the names of files, for `load_state_dict`: a trainer resumes from such."""

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from quintet.checkpoint import StackExperts
from quintet.checkpoint.rules import pieces

__all__ = ["stack_released"]


def stack_released(
    state: MutableMapping[str, Tensor],
    own: Mapping[str, Tensor],
    prefix: str,
    rules: Sequence[StackExperts],
) -> None:
    """Put what a state dict holds of single experts in the place of what a model holds of them.

    What is incomplete, or of another shape, is left, to be told as missing and unexpected.

    Args:
        state: changed in place.
        own: the parameters of the model, by name.
        prefix: what stands before these names in `state`.
        rules: which of them are stacks.
    """
    if not rules:
        return
    for name, parameter in own.items():
        parts = pieces(prefix + name, tuple(parameter.shape), rules)
        names = [part.name for part in parts]
        if names == [prefix + name] or prefix + name in state:
            continue
        if not all(p.name in state and state[p.name].shape == p.shape for p in parts):
            continue
        first = state[names[0]]
        stack = torch.empty(parameter.shape, dtype=first.dtype, device=first.device)
        for part in parts:
            part.of(stack).copy_(state.pop(part.name))
        state[prefix + name] = stack
