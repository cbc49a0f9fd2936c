"""Activations kept by autograd per token, relative to the sizes of maps.

Counted for released shapes: inputs and outputs of linear maps are most of it, and what else is kept
makes it 1.1 to 1.3 times as many, with Mamba-2's scan 8 more a channel; on kernels, which keep
inputs alone, it is .7 to .8 times as many.
"""


def numbers_per_map(kernels: bool) -> float:
    """Return the numbers kept per input and output of a map."""
    return 0.76 if kernels else 1.2


def numbers_per_scan(kernels: bool) -> float:
    """Return the additional numbers kept per channel of Mamba-2."""
    return 0.0 if kernels else 8.0


def expert_numbers(width: int, inner: int) -> int:
    """Return the inputs and outputs of one expert's maps; those of gate and up are one."""
    return 2 * width + 3 * inner
