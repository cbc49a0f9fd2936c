"""Whether a forward is transformed into another function: its derivative, or itself over rows."""

import torch
from torch.autograd import forward_ad

__all__ = ["transformed"]


def transformed() -> bool:
    """Tell whether `torch.func` or forward-mode derivatives are at work.

    What torch computes must then be made of operations it knows rules for, none of them in place.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
