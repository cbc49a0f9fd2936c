"""What kernels of `quintet.triton` are given, and what they have to make of it.

Each case is run in Triton's interpreter beside its definition, compiled for GPUs that are not here,
and, where there is one, run on it. A module here has those of one file there, as `CASES`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["MODULES", "Case", "every_case", "tensors_of"]

# Of this folder; each is compiled in a process of its own, the longest first.
MODULES = ("attention", "experts", "keeping", "linear", "mamba2", "norm", "routing", "sampling")


@dataclass(frozen=True)
class Case:
    """A call of a function that launches kernels.

    Attributes:
        name: what is special about it.
        kernel: launches, and returns tensors.
        definition: what it computes, in PyTorch, of the same arguments.
        inputs: makes the arguments, the same each time, on a device.
        tolerance: by which results may differ, of the largest magnitude of the definition's.
        compiles: whether it is compiled too: not where another case is much like it.
    """

    name: str
    kernel: Callable[..., Any]
    definition: Callable[..., Any]
    inputs: Callable[[torch.device], Mapping[str, Any]]
    tolerance: float
    compiles: bool = True


def every_case() -> list[Case]:
    return [case for name in MODULES for case in import_module(f"on_triton.{name}").CASES]


def tensors_of(made: Any) -> list[Tensor]:
    """Return the tensors of a result, in order."""
    if isinstance(made, Tensor):
        return [made]
    items: Sequence[Any] = made.values() if isinstance(made, Mapping) else made or ()
    return [x for item in items if item is not None for x in tensors_of(item)]
