"""Settings of the C library's allocator."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from functools import cache

# The parameters of mallopt(3), and what they are set to: buffers below the first size are taken
# from the heap, whose free end is handed back beyond the second.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 256 * 2**20
# Older versions take 32 MB at the most.
LARGEST = (64 * 2**20, 32 * 2**20)
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep up to 256 MB of freed memory; return whether it does.

    Otherwise each activation of a prompt is taken from the system and handed back, and the
    system clears every page of it: a fifth of the time of a prompt (docs/adr/0019). Whoever sets
    glibc's own variables is not overruled.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    if any(name in os.environ for name in VARIABLES) or "malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return False
    return keep(ctypes.CDLL(None).mallopt)


def keep(mallopt: Callable[[int, int], int]) -> bool:
    """Set or reset the thresholds of the C library; return what it keeps.

    Either setting ends the threshold's own growth, so one without the other is worse than none.
    """
    taken = any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST)
    return taken and bool(mallopt(TRIM_THRESHOLD, KEPT))
