"""Checks of a package before its kernels are called."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from quintet.kernels.calls import watched

_PLAIN = (Tensor, torch.nn.Parameter)


def lacking(package: str, least: int, most: int | None = None) -> Callable[[], str | None]:
    """Return a function from device, capability and package to the reason against using it.

    Args:
        package: the name that is imported.
        least: the compute capability that its kernels need, as 80 or 90.
        most: the last that they are for; None for any.
    """

    def missing() -> str | None:
        if not torch.cuda.device_count():
            return "there is no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        if not least <= 10 * major + minor <= (most or 10 * major + minor):
            wanted = f"{least / 10:.1f}" + ("" if most is None else f" to {most / 10:.1f}")
            return f"{package} is for compute capability {wanted}, and this is {major}.{minor}"
        return None if find_spec(package) else f"the package {package} is not installed"

    return missing


def takes(*tensors: Tensor) -> bool:
    """Return whether a package may read tensors: plain, on one GPU, unwatched, no gradient."""
    if watched() or torch.is_autocast_enabled("cuda"):
        return False
    device, learns = tensors[0].device, torch.is_grad_enabled()
    return device.type == "cuda" and all(
        type(x) in _PLAIN
        and x.device == device
        and x.layout is torch.strided
        and not (learns and x.requires_grad)
        for x in tensors
    )
