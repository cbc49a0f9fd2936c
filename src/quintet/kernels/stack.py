"""Several decoder layers for few tokens, in one kernel call."""

import operator
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from quintet.kernels.calls import Call, applies, begin, watched
from quintet.kernels.layout import agrees
from quintet.kernels.linear import kernel_name
from quintet.kernels.matrix import Kind
from quintet.kernels.parts import Fields, Part, Tokens
from quintet.kernels.shared_buffer import NOWHERE, SharedBuffer

# So many tokens pass the layers at once, and more one slice behind the other: few enough to lie
# beside the weights in a cache.
SLICE = 64
# In float32, calls of torch's own are the faster ones beyond so many tokens.
MOST_TOKENS: Mapping[str, int] = MappingProxyType(
    {"f32": 16}
    | dict.fromkeys(("bf16", "int8_bf16", "int4_bf16", "groups_bf16"), sys.maxsize)
    | dict.fromkeys(("int8_f32", "int4_f32", "groups_f32"), 64)
)


class Placed(NamedTuple):
    """The addresses of the parts' cache buffers.

    Attributes:
        rows: how many sequences there is room for.
        tensors: what is kept.
        room: how many slots there are for keys and values.
        fields: what the parts have written.
        table: for each part where its fields are, and how many bytes.
    """

    rows: int
    tensors: list[Tensor]
    room: int
    fields: "array[int]"
    table: "array[int]"


class Stack:
    """The parts of consecutive layers, checked once, with their addresses.

    It holds on to the weights it was made of, which it reads whatever the modules hold by then.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        written: Sequence[Fields],
        name: str,
        C: int,
        shared_buffers: Sequence[SharedBuffer | None],
    ) -> None:
        self._parts, self._name, self._C = tuple(parts), name, C
        self._dtype = written[0].dtype
        self._tensors = [tensor for fields in written for tensor in fields.tensors]
        # Assigning to a parameter's `data` would free what addresses were taken of.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._fields = [array("q", fields.fields) for fields in written]
        self._table = array("q")
        for part, fields, shared_buffer in zip(parts, self._fields, shared_buffers, strict=True):
            self._table.extend((part.number, *_where(fields), shared_buffer is not None))
        self._shared_buffer = next((one for one in shared_buffers if one is not None), None)
        self._angles = frozenset[int]().union(*(fields.angles for fields in written))
        self._placed: Placed | None = None
        self._work = max(sum(x.numel() for x in fields.tensors) for fields in written)

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        C: int,
        dtype: torch.dtype,
        shared_buffers: Sequence[SharedBuffer | None] | None = None,
    ) -> Self | None:
        """Build from parts for hidden states (M, C) of a dtype, or return None.

        Args:
            shared_buffers: where what each part makes is added up over processes; None for nowhere.
        """
        shared_buffers = [None] * len(parts) if shared_buffers is None else shared_buffers
        if (
            watched()
            or not agrees()
            or len({id(one) for one in shared_buffers if one is not None}) > 1
        ):
            return None
        # Kernels of groups read integers of all kinds, and those of one kind are the faster ones.
        for first in (None, Kind.GROUPS):
            written: list[Fields] = []
            kind: Kind | None = first
            for part in parts:
                fields = Fields(dtype, kind)
                part.write(fields, C)
                if not fields.fit:
                    break
                kind = fields.kind
                written.append(fields)
            if len(written) == len(parts):
                name = "" if kind is None else kernel_name(kind, dtype)
                return cls(parts, written, name, C, shared_buffers) if name in MOST_TOKENS else None
            if kind in (None, Kind.PLAIN, Kind.GROUPS):
                break
        return None

    def run(self, x: Tensor, tokens: Tokens, kept: Sequence[Sequence[Tensor]]) -> Tensor | None:
        """Run the parts on x (..., C), or return None if they cannot.

        Args:
            kept: for each part what it keeps between steps, changed in place. A sequence's tokens
                take the slots of keys and values in its row from its start on.

        Raises:
            RankFailedError: a process did not come to where what parts make adds up.
        """
        if begin() is None or not x.ndim or not x.numel() or x.shape[-1] != self._C:
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors):
            return None
        C, M = self._C, x.numel() // self._C
        rows, starts, lengths = tokens.rows, tokens.starts, tokens.lengths
        if MOST_TOKENS[self._name] < M or not len(rows) == len(starts) == len(lengths):
            return None
        if min(lengths) < 1 or sum(lengths) != M or min(starts) < 0 or len(set(rows)) < len(rows):
            return None
        cos, sin, embeds = tokens.cos, tokens.sin, tokens.embeds
        D = cos.shape[-1] if cos.ndim else 0
        angles = cos.numel() // D if D else 1
        if not self._angles <= {D} or (angles != M and set(lengths) != {angles}):
            return None
        if embeds.shape != x.shape or sin.shape != cos.shape or not applies(x, embeds, cos, sin):
            return None
        placed = self._place(kept)
        if placed is None or min(rows) < 0 or max(rows) >= placed.rows:
            return None
        if max(map(operator.add, starts, lengths)) > placed.room:
            return None
        y = x.clone(memory_format=torch.contiguous_format)
        of_tokens = [y.view(M, C), embeds.reshape(M, C)]
        of_angles = [turns.reshape(angles, D) for turns in (cos, sin)]
        calls = []
        for of, first, last in _slices(rows, starts, lengths):
            call = Call()
            own = slice(first, last) if angles == M else slice(None)
            turns = last - first if angles == M else angles
            call.integers(last - first, C, placed.rows, len(of) // 4, turns, D)
            call.integers(self._work, len(self._parts))
            for tensor in of_tokens:
                call.packed(tensor[first:last], self._dtype, last - first, C)
            for tensor in of_angles:
                call.packed(tensor[own], self._dtype, turns, D)
            call.integers(*_where(of), *_where(self._table), *_where(placed.table))
            call.integers(*(NOWHERE if self._shared_buffer is None else self._shared_buffer.fields))
            calls.append((call, of))
        if not all(call.fit for call, _ in calls):
            return None
        for i, (call, _) in enumerate(calls):
            if not call.run(f"stack_{self._name}"):
                if i:
                    raise RuntimeError("a kernel refused a slice of tokens like those it took")
                return None
        if self._shared_buffer is not None:
            self._shared_buffer.check()
        return y

    def _place(self, kept: Sequence[Sequence[Tensor]]) -> "Placed | None":
        """Return the buffers' addresses, recomputed if they changed."""
        tensors = [tensor for part in kept for tensor in part]
        last = self._placed
        # Neither shape nor address of a tensor changes while it is the same.
        same = last is not None and len(last.tensors) == len(tensors)
        if last is not None and same and all(map(operator.is_, last.tensors, tensors)):
            return last
        rows = next((len(tensor) for tensor in tensors if tensor.ndim), sys.maxsize)
        held = Fields(self._dtype)
        ends = [0]
        for part, own in zip(self._parts, kept, strict=True):
            part.held(own, held, rows)
            ends.append(len(held.fields))
        if not held.fit:
            return None
        fields = array("q", held.fields)
        base, _ = fields.buffer_info()
        table = array("q")
        for start, end in pairwise(ends):
            table.extend((base + 8 * start, 8 * (end - start)))
        # Another thread may put its own there before this one returns.
        placed = self._placed = Placed(rows, tensors, held.room, fields, table)
        return placed


def _where(fields: "array[int]") -> tuple[int, int]:
    address, count = fields.buffer_info()
    return address, 8 * count


def _slices(
    rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
) -> "Iterator[tuple[array[int], int, int]]":
    """Yield sequences in slices of at most `SLICE` tokens, with their offsets."""
    of, begin, end = array("q"), 0, 0
    for row, start, length in zip(rows, starts, lengths, strict=True):
        if of and end + length - begin > SLICE:
            yield of, begin, end
            of, begin = array("q"), end
        of.extend((row, start, length, end - begin))
        end += length
    yield of, begin, end
