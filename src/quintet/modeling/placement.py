"""Which dtype and which device a caller names."""

import difflib
from collections.abc import Mapping

import torch

from quintet.configuration.base import FLOAT_DTYPES
from quintet.errors import InputError, UnsupportedBackendError

__all__ = ["DeviceMap", "named_dtype", "single_device"]

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device] | None


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a floating-point dtype by its name or itself.

    Raises:
        InputError: it is not one that weights can have.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        near = difflib.get_close_matches(name, FLOAT_DTYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"dtype={dtype!r} has to be 'auto' or one of {FLOAT_DTYPES}{hint}")
    found: torch.dtype = getattr(torch, name)
    return found


def single_device(device_map: DeviceMap) -> torch.device:
    """Return the one device that is named; "auto" is the GPU where there is one, -1 the CPU.

    Raises:
        UnsupportedBackendError: this machine does not have it, or several are named.
    """
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise UnsupportedBackendError(
                f"device_map={dict(device_map)!r}: a model is placed on one device; "
                "name it, for example device_map='cuda:0'"
            )
        device_map = device_map[""]
    if device_map is None:
        return torch.get_default_device()
    if device_map == -1:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedBackendError(
            f"device_map={device_map!r} is not a device of this machine ({reason})"
        ) from None
    return device
