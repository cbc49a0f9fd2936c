"""Sums over processes of one machine in shared memory, in microseconds.

The sum of all is made by each in the same order, so that all have the same bits.
"""

import ctypes
import mmap
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from quintet.errors import RankFailedError
from quintet.kernels.calls import Call

LINE, SLOT = 64, 1 << 18
# What stands in a call where there is no shared buffer.
NOWHERE = (0,) * 9
# As csrc/shared_buffer.cpp numbers them.
KINDS: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.bfloat16: 0, torch.float32: 1, torch.float64: 2, torch.int64: 3, torch.int32: 4}
)


def size_of(count: int, slot: int = SLOT) -> int:
    """Return the size in bytes for a number of processes."""
    return count * (LINE + 2 * slot)


@dataclass(eq=False)
class SharedBuffer:
    """Shared memory for collectives; all processes make the same calls in order.

    Attributes:
        mapped: the memory.
        index: which of the processes this is.
        ranks: what each is called elsewhere.
        file: of the memory; each process holds a lock on its byte of it.
        patience: how many seconds to wait for another.
        slot: how many bytes each writes at once.
        left: 1 + the process that did not come, and whether it has ended; 0 while all do.
    """

    mapped: mmap.mmap
    index: int
    ranks: list[int]
    file: int
    patience: float
    slot: int = SLOT
    left: "array[int]" = field(default_factory=lambda: array("q", (0, 0)))
    fields: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        # As long as this is there, the memory stays mapped.
        self._first = ctypes.c_char.from_buffer(self.mapped)
        left, size = self.left.buffer_info()
        self.fields = (
            *(ctypes.addressof(self._first), len(self.mapped), left, 8 * size),
            *(self.index, len(self.ranks), self.slot, int(self.patience * 1e9), self.file),
        )

    @property
    def calls(self) -> int:
        """The number of rendezvous of this process."""
        at = self.index * LINE
        return int.from_bytes(self.mapped[at : at + 8], "little")

    def write(self, call: Call) -> None:
        """Write the buffer's address into a call."""
        call.integers(*self.fields)

    def sum(self, x: Tensor) -> bool:
        """Sum in place over processes; return False for unsupported dtypes.

        Raises:
            RankFailedError: one of them has ended, or did not come in time.
        """
        kind = KINDS.get(x.dtype)
        if kind is None or not x.is_contiguous():
            return False
        call = Call()
        self.write(call)
        call.integers(kind, x.numel(), x.data_ptr(), x.nbytes)
        ran = call.run("shared_buffer_sum")
        self.check()
        return ran

    def gather(self, x: Tensor) -> Tensor | None:
        """Stack the tensors of all processes along a new first axis, or return None.

        Raises:
            RankFailedError: one of them has ended, or did not come in time.
        """
        x = x.contiguous()
        made = x.new_empty(len(self.ranks), *x.shape)
        call = Call()
        self.write(call)
        call.integers(x.nbytes, x.data_ptr(), x.nbytes, made.data_ptr(), made.nbytes)
        ran = call.run("shared_buffer_gather")
        self.check()
        return made if ran else None

    def check(self) -> None:
        """Raise if a process did not take part.

        Raises:
            RankFailedError: one did.
        """
        other, ended = self.left
        if other:
            slow = f"did not come to a sum within {self.patience:g} s: it stands still"
            raise RankFailedError(self.ranks[other - 1], "has ended" if ended else slow)
