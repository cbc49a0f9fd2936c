"""Shared memory for collectives within one machine."""

import fcntl
import mmap
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from quintet.kernels.native import available
from quintet.kernels.shared_buffer import SharedBuffer, size_of

FOLDER = Path("/dev/shm")
NAME = 16
# A group of torch has no room for what belongs to it.
_OF_GROUPS: "WeakKeyDictionary[dist.ProcessGroup, SharedBuffer | None]" = WeakKeyDictionary()


def shared_buffer_of(group: dist.ProcessGroup) -> SharedBuffer | None:
    """Return the memory of a group's processes, None if not all can have the same.

    All have to ask at the same time when they do so first.
    """
    if group not in _OF_GROUPS:
        _OF_GROUPS[group] = _open(group) if "gloo" in dist.get_backend(group) else None
    return _OF_GROUPS[group]


def sum_in_place(x: Tensor, group: dist.ProcessGroup) -> None:
    """Sum the tensors of all processes of a group.

    Raises:
        RankFailedError: one of them has ended, or did not come in time.
    """
    shared_buffer = shared_buffer_of(group) if x.is_cpu else None
    if shared_buffer is None or not shared_buffer.sum(x):
        dist.all_reduce(x, group=group)


def join(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the tensors of all processes of a group along a new first axis.

    Raises:
        RankFailedError: one of them has ended, or did not come in time.
    """
    shared_buffer = shared_buffer_of(group) if x.is_cpu else None
    gathered = None if shared_buffer is None else shared_buffer.gather(x)
    if gathered is None:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)
    return gathered


def _open(group: dist.ProcessGroup) -> SharedBuffer | None:
    """Map a file of the first process in all, and agree on whether that worked in all."""
    ranks = dist.get_process_group_ranks(group)
    index, count = dist.get_rank(group), len(ranks)
    name = torch.zeros(NAME, dtype=torch.uint8, device="cpu")
    path, file = None, None
    able = available()
    if index == 0 and able:
        path, file = _create(size_of(count))
        if path is not None:
            name = torch.tensor(
                list(bytes.fromhex(path.name.rpartition("-")[2])), dtype=name.dtype, device="cpu"
            )
    dist.broadcast(name, ranks[0], group=group)
    if index and able and name.any():
        with suppress(OSError):
            file = os.open(_path(bytes(name.tolist())), os.O_RDWR)
    shared_buffer = None
    if file is not None:
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
            memory = mmap.mmap(file, size_of(count))
            shared_buffer = SharedBuffer(memory, index, ranks, file, _patience(group))
    opened = torch.tensor([shared_buffer is not None], dtype=torch.uint8, device="cpu")
    of_all = [torch.empty_like(opened) for _ in ranks]
    dist.all_gather(of_all, opened, group=group)
    if path is not None:
        # It lives as long as somebody has it mapped.
        path.unlink()
    if all(bool(one) for one in of_all):
        return shared_buffer
    if file is not None:
        os.close(file)
    return None


def _create(size: int) -> tuple[Path, int] | tuple[None, None]:
    """Make a file of memory that is there, not only promised."""
    path = _path(secrets.token_bytes(NAME))
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None, None
    try:
        os.posix_fallocate(file, 0, size)
    except OSError:
        path.unlink()
        return None, None
    return path, file


def _path(name: bytes) -> Path:
    return FOLDER / f"quintet-shared-{name.hex()}"


def _patience(group: dist.ProcessGroup) -> float:
    """Return the timeout of a group's messages in seconds."""
    backend: Any = group._get_backend(torch.device("cpu"))
    return float(backend.options._timeout.total_seconds())
