"""The memory of a pool's rows: keys and values or latents, or codes of them.

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


class RowMemory(AttentionSlot, Protocol):
    """What one layer keeps of the tokens of a pool's rows.

    A row is named by its place in the pool's table. The pool checks what it asks for.
    """

    @property
    def kind(self) -> str:
        """How tokens are kept; content goes from one memory to another of the same kind."""
        ...

    def read(self, row: int, start: int, stop: int) -> tuple[Tensor, ...]:
        """Return copies of what is kept of a row's tokens, (K, stop - start, D) each."""
        ...

    def check(self, content: Sequence[Tensor]) -> None:
        """Check that content can be written here.

        Raises:
            InputError: it is of another layer or model.
        """
        ...

    def write(self, row: int, start: int, content: Sequence[Tensor]) -> None:
        """Put tensors that `read` returned into a row, from a slot on."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Put the tokens of a row into another."""
        ...

    def clear(self, row: int, start: int, stop: int) -> None:
        """Make some slots of a row hold numbers, whatever they held."""
        ...


class Buffers:
    """Tensors (R, ...) of which the first rows are in use.

    Attributes:
        whole: the tensors; none before memory was taken.
    """

    def __init__(self, table: RowTable) -> None:
        self.table = table
        self.whole: tuple[Tensor, ...] = ()

    def allocate(self, like: Sequence[Tensor]) -> None:
        """Take memory for R rows of tensors (...) such as these, and do not touch it."""
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.whole = tuple(
                torch.empty(self.table.size, *x.shape, dtype=x.dtype, device=x.device) for x in like
            )

    def in_use(self) -> tuple[Tensor, ...]:
        """Return the rows in use of each tensor."""
        return tuple(x[: len(self.table)] for x in self.whole)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Return both tensors with all rows; None before memory was taken.

        They are the same objects in every forward, which a kernel need not look at again.
        """
        if not self.whole:
            return None
        first, second = self.whole
        return first, second

    def check(self, content: Sequence[Tensor], *axes: int) -> None:
        """Check that a row's content is as large as rows here, on some axes or all, and alike."""
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
    """How tokens are kept."""

    @abstractmethod
    def encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values (B, K, T, D) as they are kept, (B, K, T, ...) each."""

    @abstractmethod
    def decoded(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of what is kept."""


class TokenRows(TokenKind):
    """Buffers (R, K, capacity, D); what they hold of tokens is said by `encoded` and `decoded`.

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
        """Return copies of what is kept of a row's tokens, (K, stop - start, D) each."""
        return tuple(x[row, :, start:stop].clone() for x in self._buffers.whole)

    def check(self, content: Sequence[Tensor]) -> None:
        """Check that content can be written here.

        Raises:
            InputError: it is of another layer or model.
        """
        self._buffers.check(content, 0, 2)

    def write(self, row: int, start: int, content: Sequence[Tensor]) -> None:
        """Put tensors that `read` returned into a row, from a slot on."""
        if content and not self._buffers.whole:
            self._allocate(content)
        for buffer, x in zip(self._buffers.whole, content, strict=False):
            buffer[row, :, start : start + x.shape[1]] = x

    def copy(self, source: int, target: int) -> None:
        """Put the tokens of a row into another."""
        stop = self._table[source].length
        for buffer in self._buffers.whole:
            buffer[target, :, :stop] = buffer[source, :, :stop]

    def clear(self, row: int, start: int, stop: int) -> None:
        """Make some slots of a row hold numbers, whatever they held."""
        # A weight of 0 times NaN would still be NaN.
        for buffer in self._buffers.whole:
            buffer[row, :, start:stop] = 0

    # -- as every slot ---------------------------------------------------------------------------

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return the buffers of all rows, for the caller to write; None where it cannot."""
        return None

    def select(self, rows: Tensor) -> None:
        """Keep the given rows (N,) of the batch, in that order, each as often as it is named."""
        moved = [(to, at) for to, at in enumerate(rows.tolist()) if to != at]
        held = {at: self.read(at, 0, self._table[at].length) for _, at in moved}
        for to, at in moved:
            self.write(to, 0, held[at])

    def crop(self, lengths: int | Tensor) -> None:
        """Do nothing: what is behind a row's length is never seen and is overwritten."""

    def snapshot(self, lengths: int | Tensor) -> None:
        """Do nothing: any length can be gone back to."""

    def reset(self) -> None:
        """Do nothing: rows that join look at nothing that was here."""

    @property
    def batch_size(self) -> int | None:
        """The number of rows in use."""
        return len(self._table)

    @property
    def dtype(self) -> torch.dtype | None:
        """What numbers are kept in, None before memory was taken or where it is no matter."""
        return None

    @property
    def nbytes(self) -> int:
        """The bytes taken, of rows that are free too."""
        return self._buffers.nbytes

    # -- for kinds -------------------------------------------------------------------------------

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The buffers of all rows; none before memory was taken."""
        return self._buffers.whole

    def update(self, keys: Tensor, values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) of a segment and return all (B, K, S, D) its rows attend to."""
        self.store(self.encoded(keys, values), segment)
        return self.content(segment.keys, segment.rows)

    def content(self, length: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Return the first `length` keys and values of some rows in use, or all: (B, K, length, D).

        Raises:
            InputError: nothing is stored yet.
        """
        return self.decoded(self.first(length, rows))

    def store(self, new: Sequence[Tensor], segment: Segment) -> None:
        """Put tensors (B, K, T, D), always as many, at the slots of a segment."""
        if not self._buffers.whole:
            self._allocate([x[0] for x in new])
            for index in range(len(self._table)):
                self.clear(index, 0, whole_blocks(segment.capacity, self.capacity))
        held = self._buffers.in_use()
        for buffer, x in zip(held, new, strict=True):
            check_alike("keys or values (heads x numbers)", buffer, x, 1, 3)
        for buffer, x in zip(held, new, strict=True):
            _write(buffer, x, segment)

    def first(self, length: int, rows: slice | None) -> tuple[Tensor, ...]:
        """Return what was stored of the first tokens of some rows, (B, K, length, D) each.

        Raises:
            InputError: nothing is stored yet.
        """
        if not self._buffers.whole:
            raise InputError("this layer of the cache is empty; run the model with it first")
        held = (x[:, :, :length] for x in self._buffers.in_use())
        return tuple(x if rows is None else x[rows] for x in held)

    def _allocate(self, like: Sequence[Tensor]) -> None:
        """Take memory for rows of (K, T, D)."""
        self._buffers.allocate([x[:, :1].expand(-1, self.capacity, -1) for x in like])


class DenseRows(TokenRows):
    """Keys and values, or latents and rotated keys, as they are."""

    kind: ClassVar[str] = "dense"

    def encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values as they are."""
        return keys, values

    def decoded(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the keys and values as they are."""
        keys, values = held
        return keys, values

    def buffers(self, segment: Segment) -> tuple[Tensor, Tensor] | None:
        """Return the buffers of all rows, for the caller to write; None without memory."""
        return self._buffers.pair()

    @property
    def dtype(self) -> torch.dtype | None:
        """What numbers are kept in, None before memory was taken."""
        return self._buffers.whole[0].dtype if self._buffers.whole else None


class CodeRows(TokenRows):
    """Keys and values in few bits: codes and scales of vectors, decoded one layer at a time."""

    def __init__(self, table: RowTable, capacity: int, code: VectorCode) -> None:
        super().__init__(table, capacity)
        self.code = code
        self._dtype = torch.float32

    @property
    def kind(self) -> str:
        """How tokens are kept."""
        return f"int{self.code.bits}"

    def encoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Return codes and scales of keys, and those of values.

        Raises:
            InputError: vectors of this size do not fill whole bytes.
        """
        self._dtype = keys.dtype
        return (*self.code.encode(keys), *self.code.encode(values))

    def decoded(self, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of codes and scales."""
        keys, key_scales, values, value_scales = held
        return (
            self.code.decode(keys, key_scales, self._dtype),
            self.code.decode(values, value_scales, self._dtype),
        )
