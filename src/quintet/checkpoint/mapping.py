"""Memory-mapped weight files: tensors are views, and pages can be released."""

import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

from quintet.checkpoint.header import TensorInfo


class MappedFile:
    """A private mapping of a file: writes to a view never reach the file.

    The views keep the mapping alive; a file that is replaced meanwhile stays what it was.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, info: TensorInfo) -> Tensor:
        """Return a tensor of the file, a view if its data is aligned.

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
        """Release the pages that hold only this tensor; reading brings them back."""
        first = -(-info.start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (info.start + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if sys.platform != "win32" and last > first:
            self._bytes.madvise(mmap.MADV_DONTNEED, first, last - first)
