"""The memory of a pool's rows: keys and values, latents, or their codes.

On a CPU a row is a contiguous part of buffers that are allocated once and touched as they are
used. Another layout, in pages say, is another `RowMemory`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from quintet.cache.dense import _write
from quintet.cache.memory import check_alike
from quintet.cache.rows import RowTable, whole_blocks
from quintet.cache.segment import Segment
from quintet.cache.slots import AttentionSlot
from quintet.errors import InputError
from quintet.ops.vector_codes import VectorCode

# Where what one head keeps of a slot lies in one piece. Kernels for CPUs read two.
_JOINING = ("cuda",)


class RowMemory(AttentionSlot, Protocol):
    """One layer's memory of the tokens of a pool's rows.

    A row is named by its place in the pool's table. The pool checks what it asks for.
    """

    @property
    def kind(self) -> str:
        """The storage format; content moves only between memories of the same format."""
        ...

    def read(self, row: int, start: int, stop: int) -> tuple[Tensor, ...]:
        """Copy a row's tokens, (K, stop - start, D) each."""
        ...

    def check(self, content: Sequence[Tensor]) -> None:
        """Check that content can be written here.

        Raises:
            InputError: it is of another layer or model.
        """
        ...

    def write(self, row: int, start: int, content: Sequence[Tensor]) -> None:
        """Write tensors that `read` returned into a row, from a slot on."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy one row over another."""
        ...

    def clear(self, row: int, start: int, stop: int) -> None:
        """Fill slots of a row with finite numbers."""
        ...


class Buffers:
    """Tensors (R, ...) whose first rows are in use.

    Attributes:
        whole: the tensors; none before memory was taken.
    """

    def __init__(self, table: RowTable) -> None:
        self.table = table
        self.whole: tuple[Tensor, ...] = ()

    def allocate(self, like: Sequence[Tensor]) -> None:
        """Allocate R rows of tensors (...) like these, without touching the memory."""
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.whole = tuple(
                torch.empty(self.table.size, *x.shape, dtype=x.dtype, device=x.device) for x in like
            )

    def allocate_joined(self, first: Tensor, second: Tensor) -> None:
        """Allocate rows of both, (K, T, D) each, the numbers of a slot beside each other."""
        sizes, width = (self.table.size, *first.shape[:-1]), first.shape[-1]
        with torch.inference_mode(False), torch.no_grad():
            whole = first.new_empty(*sizes, width + second.shape[-1])
            self.whole = whole[..., :width], whole[..., width:]

    def in_use(self) -> tuple[Tensor, ...]:
        """Return each tensor's rows in use."""
        return tuple(x[: len(self.table)] for x in self.whole)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Return both tensors with all rows, or None before allocation.

        They are the same objects in every forward, which a kernel need not look at again.
        """
        if not self.whole:
            return None
        first, second = self.whole
        return first, second

    def check(self, content: Sequence[Tensor], *axes: int) -> None:
        """Check that a row's content matches the rows here, on some axes or all."""
        for buffer, x in zip(self.whole, content, strict=False):
            check_alike("rows", buffer[0], x, *(axes or range(x.ndim)))
            if buffer.dtype != x.dtype:
                raise InputError(
                    f"the pool holds {buffer.dtype} and the content {x.dtype}; take content of the "
                    "model as it is now"
                )

    @property
    def nbytes(self) -> int:
        """The bytes taken."""
        return sum(x.nbytes for x in self.whole)


class TokenKind(ABC):
    """A storage format of tokens."""

    @abstractmethod
    def encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Encode keys and values (B, K, T, D) as (B, K, T, ...) each."""

    @abstractmethod
    def decoded(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode keys and values."""


class TokenRows(TokenKind):
    """Buffers (R, K, capacity, D) of tokens in the format of `encoded` and `decoded`.

    Args:
        table: the rows in use.
        capacity: how many tokens a row has room for.
    """

    def __init__(self, table: RowTable, capacity: int) -> None:
        self.capacity = capacity
        self._table = table
        self._buffers = Buffers(table)

    # -- for the pool ----------------------------------------------------------------------------

    def read(self, row: int, start: int, stop: int) -> tuple[Tensor, ...]:
        """Copy a row's tokens, (K, stop - start, D) each."""
        return tuple(x[row, :, start:stop].clone() for x in self._buffers.whole)

    def check(self, content: Sequence[Tensor]) -> None:
        """Check that content can be written here.

        Raises:
            InputError: it is of another layer or model.
        """
        self._buffers.check(content, 0, 2)

    def write(self, row: int, start: int, content: Sequence[Tensor]) -> None:
        """Write tensors that `read` returned into a row, from a slot on."""
        if content and not self._buffers.whole:
            self._allocate(content)
        for buffer, x in zip(self._buffers.whole, content, strict=False):
            buffer[row, :, start : start + x.shape[1]] = x

    def copy(self, source: int, target: int) -> None:
        """Copy one row over another."""
        stop = self._table[source].length
        for buffer in self._buffers.whole:
            buffer[target, :, :stop] = buffer[source, :, :stop]

    def clear(self, row: int, start: int, stop: int) -> None:
        """Fill slots of a row with finite numbers."""
        # A weight of 0 times NaN would still be NaN.
        for buffer in self._buffers.whole:
            buffer[row, :, start:stop] = 0

    # -- as every slot ---------------------------------------------------------------------------

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return the buffers of all rows for writing, or None."""
        return None

    def select(self, rows: Tensor) -> None:
        """Keep the rows (N,), in that order; rows may repeat."""
        moved = [
            (target, source) for target, source in enumerate(rows.tolist()) if target != source
        ]
        contents = {source: self.read(source, 0, self._table[source].length) for _, source in moved}
        for target, source in moved:
            self.write(target, 0, contents[source])

    def crop(self, lengths: int | Tensor) -> None:
        """Do nothing: tokens behind a row's length are never read."""

    def snapshot(self, lengths: int | Tensor) -> None:
        """Do nothing: `crop` needs no preparation."""

    def reset(self) -> None:
        """Do nothing: rows that join read nothing of former ones."""

    @property
    def batch_size(self) -> int | None:
        """The number of rows in use."""
        return len(self._table)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the numbers, or None if any will do or nothing is allocated."""
        return None

    @property
    def nbytes(self) -> int:
        """The allocated bytes, free rows included."""
        return self._buffers.nbytes

    # -- for kinds -------------------------------------------------------------------------------

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The buffers of all rows; none before allocation."""
        return self._buffers.whole

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """Store a segment's (B, K, T, D); return all (B, K, S, D) its rows attend to."""
        self.store(self.encoded(keys, values), segment)
        return self.content(segment.keys, segment.rows)

    def content(self, length: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values of rows in use: (B, K, length, D).

        Raises:
            InputError: nothing is stored yet.
        """
        return self.decoded(self.first(length, rows))

    def store(self, new: Sequence[Tensor], segment: Segment) -> None:
        """Write encoded tensors (B, K, T, D) at a segment's slots."""
        if not self._buffers.whole:
            self._allocate([x[0] for x in new])
            for index in range(len(self._table)):
                self.clear(index, 0, whole_blocks(segment.capacity, self.capacity))
        buffers = self._buffers.in_use()
        for buffer, x in zip(buffers, new, strict=True):
            check_alike("keys or values (heads x numbers)", buffer, x, 1, 3)
        for buffer, x in zip(buffers, new, strict=True):
            _write(buffer, x, segment)

    def first(self, length: int, rows: slice | None) -> tuple[Tensor, ...]:
        """Return the encoded first tokens of some rows, (B, K, length, D) each.

        Raises:
            InputError: nothing is stored yet.
        """
        if not self._buffers.whole:
            raise InputError("this layer of the cache is empty; run the model with it first")
        buffers = (x[:, :, :length] for x in self._buffers.in_use())
        return tuple(x if rows is None else x[rows] for x in buffers)

    def _allocate(self, like: Sequence[Tensor]) -> None:
        """Allocate rows of (K, T, D)."""
        self._buffers.allocate(self._rows(like))

    def _rows(self, like: Sequence[Tensor]) -> list[Tensor]:
        return [x[:, :1].expand(-1, self.capacity, -1) for x in like]


class DenseRows(TokenRows):
    """Keys and values, or latents and rotated keys, unquantised."""

    kind: ClassVar[str] = "dense"

    def _allocate(self, like: Sequence[Tensor]) -> None:
        """Allocate rows; on a GPU, latents beside their rotated keys, as FlashMLA reads them."""
        first, second = self._rows(like)
        if first.device.type in _JOINING and first.shape[0] == 1 and first.dtype == second.dtype:
            self._buffers.allocate_joined(first, second)
        else:
            super()._allocate(like)

    def encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values unchanged."""
        return keys, values

    def decoded(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values unchanged."""
        keys, values = stored
        return keys, values

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return the buffers of all rows for writing, or None before allocation."""
        return self.pair()

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values of all rows, (R, K, capacity, D); None without memory."""
        return self._buffers.pair()

    @property
    def dtype(self) -> torch.dtype | None:
        return self._buffers.whole[0].dtype if self._buffers.whole else None


class CodeRows(TokenRows):
    """Keys and values as quantised vectors, decoded one layer at a time."""

    def __init__(self, table: RowTable, capacity: int, code: VectorCode) -> None:
        super().__init__(table, capacity)
        self.code = code
        self._dtype = torch.float32

    @property
    def kind(self) -> str:
        """The storage format."""
        return f"int{self.code.bits}"

    def encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return codes and scales of keys, then of values.

        Raises:
            InputError: vectors of this size do not fill whole bytes.
        """
        self._dtype = keys.dtype
        return (*self.code.encode(keys), *self.code.encode(values))

    def decoded(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys, key_scales, values, value_scales = stored
        return (
            self.code.decode(keys, key_scales, self._dtype),
            self.code.decode(values, value_scales, self._dtype),
        )
