"""Moves weights into pages of 2 MB, to save address lookups."""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread, get_native_id

from torch import Tensor

PAGE = 2 << 20
# madvise(2): move what is there into large pages, now. Since Linux 6.1.
COLLAPSE = 25
# Less gains nothing that can be measured.
LEAST = 16 << 20
# What lies between weights that were allocated one behind the other.
GAP = 64 << 10
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/maps")

Range = tuple[int, int]


def hold_in_large_pages(tensors: Iterable[Tensor]) -> Thread | None:
    """Start moving CPU tensors into large pages; return the thread, or None.

    They can be used meanwhile. What is a view of a mapped file stays one. None where there is
    little to move, or the system has no large pages or was told not to use them.
    """
    held = (x for x in tensors if x.device.type == "cpu" and x.nbytes)
    ranges = list(_joined(sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in held)))
    if sum(end - start for start, end in ranges) < LEAST or not _switched_on():
        return None
    own = list(_common(ranges, _anonymous()))
    # Where memory is in pieces, the system first has to make room, which takes seconds.
    thread = Thread(target=_move_behind, args=(own,), name="quintet-large-pages", daemon=True)
    thread.start()
    return thread


def _move_behind(ranges: Iterable[Range]) -> None:
    """Move in a low-priority thread."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 10)
    _move(ranges)


def _move(ranges: Iterable[Range]) -> int:
    """Move these ranges; return the number of bytes moved."""
    madvise = ctypes.CDLL(None).madvise
    moved = 0
    for first, last in ranges:
        for start in range(-(-first // PAGE) * PAGE, last // PAGE * PAGE, PAGE):
            moved += 0 if madvise(ctypes.c_void_p(start), ctypes.c_size_t(PAGE), COLLAPSE) else PAGE
    return moved


def _switched_on() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return "[never]" not in SETTING.read_text(encoding="ascii")
    except OSError:
        return False


def _joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """Merge ordered ranges that nearly touch."""
    start = end = 0
    for first, last in ranges:
        if start < end and first <= end + GAP:
            end = max(end, last)
            continue
        if start < end:
            yield start, end
        start, end = first, last
    if start < end:
        yield start, end


def _anonymous() -> Iterator[Range]:
    """Yield this process's anonymous memory ranges, in order."""
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        where, rights, _, _, inode, *name = line.split(maxsplit=5)
        if inode == "0" and rights.startswith("rw") and (not name or name[0] == "[heap]"):
            start, end = where.split("-")
            yield int(start, 16), int(end, 16)


def _common(these: Iterable[Range], those: Iterable[Range]) -> Iterator[Range]:
    """Yield the intersection of two ordered lists of ranges."""
    left, right = iter(these), iter(those)
    one, other = next(left, None), next(right, None)
    while one is not None and other is not None:
        start, end = max(one[0], other[0]), min(one[1], other[1])
        if start < end:
            yield start, end
        if one[1] <= other[1]:
            one = next(left, None)
        else:
            other = next(right, None)
