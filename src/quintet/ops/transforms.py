"""Detects recording (compilers, exporters) and function transforms."""

import torch
from torch.autograd import forward_ad


def recorded() -> bool:
    """Return whether a compiler, exporter or tracer records the computation.

    The program has to serve other numbers, and where it can, other lengths.
    """
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def batched() -> bool:
    """Return whether `torch.func.vmap` is at work: numbers cannot be read, nor decide on shapes."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(one.key() == torch._C._functorch.TransformType.Vmap for one in stack)


def transformed() -> bool:
    """Return whether `torch.func` or forward-mode derivatives are active.

    What torch computes must then be made of operations it knows rules for, none of them in place.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
