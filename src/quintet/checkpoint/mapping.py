"""A file of weights in the address space: tensors are views of it, and pages can be given back."""

import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

from quintet.checkpoint.header import TensorInfo


class MappedFile:
    """A file mapped privately: writes to a view reach neither the file nor its readers.

    The views keep the mapping alive; a file that is replaced meanwhile stays what it was.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, info: TensorInfo) -> Tensor:
        """Return a tensor of the file, a view where its data lies as its dtype needs it.

        Of blocks, the bytes (..., O, bytes a row).
        """
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype, device="cpu")
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        if info.blocks is not None:
            return raw.view(*info.shape[:-1], -1)
        # Older writers did not pad their headers.
        aligned = raw if info.start % info.dtype.itemsize == 0 else raw.clone()
        return aligned.view(info.dtype).view(info.shape)

    def forget(self, info: TensorInfo) -> None:
        """Drop the pages that hold nothing but this tensor; they come back when they are read."""
        first = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (info.start + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if sys.platform != "win32" and last > first:
            self._bytes.madvise(mmap.MADV_DONTNEED, first, last - first)
