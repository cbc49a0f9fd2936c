"""The devices of Triton's kernels: CUDA, or Triton's interpreter for tests.

`TRITON_INTERPRET=1`, set before Triton is imported, computes kernels in NumPy on the CPU.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from quintet.kernels.calls import watched

PLAIN = (Tensor, torch.nn.Parameter)


def missing() -> str | None:
    """Return why kernels cannot run on this machine; None if they can."""
    return None if torch.cuda.device_count() else "there is no CUDA device"


def capability() -> int:
    """Return the current device's capability, as 80 or 90; 0 for the interpreter."""
    if triton.knobs.runtime.interpret:
        return 0
    return int(triton.runtime.driver.active.get_current_target().arch)


def takes(*tensors: Tensor) -> bool:
    """Return whether kernels may read these tensors: plain, on one device, and unwatched."""
    if watched() or torch.is_autocast_enabled("cuda"):
        return False
    device, learns = tensors[0].device, torch.is_grad_enabled()
    usable = device.type == "cuda" or triton.knobs.runtime.interpret
    return usable and all(
        type(x) in PLAIN
        and x.device == device
        and x.layout is torch.strided
        and not x.is_neg()
        and not (learns and x.requires_grad)
        for x in tensors
    )


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Tensor | float | None,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: object,
) -> None:
    """Run a kernel over a grid of programs, on the device of its first argument.

    Args:
        kernel: what `triton.jit` made.
        grid: how many programs along each of up to three axes.
        args: what it is given when it runs; tensors as their first address.
        num_warps: of a program, 32 threads each.
        num_stages: that loads of a loop are ahead.
        constants: what it is compiled for, by name.
    """
    first = args[0]
    assert isinstance(first, Tensor)
    if 0 in grid:
        return
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            launch(kernel, grid, *args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    # A product and a sum may be rounded once: said, since what Triton takes it for changes.
    how = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    kernel[grid](*args, **constants, **how)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n: the sizes a block may have."""
    return 1 << max(n - 1, 0).bit_length()
