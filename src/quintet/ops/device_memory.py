"""Free memory, and out-of-memory errors."""

import re

import torch

# What allocators of CPUs say, for which torch has no class.
PHRASES = ("can't allocate memory", "not enough memory")


def host_memory() -> int:
    """Return the bytes of memory available without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
        return int(found[1]) * 1024 if found else 2**62
    except OSError:
        return 2**62


def free_memory(device: torch.device) -> int:
    """Return the bytes this process can allocate on a device.

    On a CUDA device these are the free ones, and those that torch keeps of what was freed.
    """
    if device.type != "cuda":
        return host_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def empty_caches() -> None:
    """Release torch's cached GPU memory."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def is_shortage(error: BaseException) -> bool:
    """Return whether an error is an out-of-memory error of any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)
