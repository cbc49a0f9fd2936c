"""Decoder layers for few tokens, in one call."""

import operator
import sys
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, pairwise
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from quintet.kernels.calls import applies, begin, watched
from quintet.kernels.linear import kernel_name
from quintet.kernels.parts import Fields, Part, Tokens

__all__ = ["Stack"]

# Beyond so many tokens, calls of their own cost little beside what the layers compute.
MOST_TOKENS: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("bf16", "f32", "int8_bf16", "int8_f32", "int4_bf16", "int4_f32"), 64)
)


class Placed(NamedTuple):
    """Where what parts keep between steps is.

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
    """Parts of layers as the kernel reads them: checked, and their addresses taken down once.

    It holds on to the weights it was made of, which it reads whatever the modules hold by then.
    """

    def __init__(self, parts: Sequence[Part], written: Sequence[Fields], name: str, C: int) -> None:
        self._parts, self._name, self._C = tuple(parts), name, C
        self._dtype = written[0].dtype
        self._tensors = [tensor for fields in written for tensor in fields.tensors]
        # Assigning to a parameter's `data` would free what addresses were taken of.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._fields = [array("q", fields.fields) for fields in written]
        self._table = array("q")
        for part, fields in zip(parts, self._fields, strict=True):
            self._table.extend((part.number, *_where(fields)))
        self._angles = frozenset[int]().union(*(fields.angles for fields in written))
        self._placed: Placed | None = None
        self._work = max(sum(x.numel() for x in fields.tensors) for fields in written)

    @classmethod
    def of(cls, parts: Sequence[Part], C: int, dtype: torch.dtype) -> Self | None:
        """Return parts for hidden states (M, C) of a dtype; None where the kernel cannot."""
        if watched():
            return None
        written = []
        kind: torch.dtype | None = None
        for part in parts:
            fields = Fields(dtype, kind)
            part.write(fields, C)
            if not fields.fit:
                return None
            kind = fields.kind
            written.append(fields)
        name = "" if kind is None else kernel_name(kind, dtype)
        return cls(parts, written, name, C) if name in MOST_TOKENS else None

    def run(self, x: Tensor, tokens: Tokens, kept: Sequence[Sequence[Tensor]]) -> Tensor | None:
        """Return what the parts make of x (..., C), the last one's sum; None if they cannot.

        Args:
            kept: for each part what it keeps between steps, changed in place. A sequence's tokens
                take the slots of keys and values in its row from its start on.
        """
        call = begin()
        if call is None or not x.ndim or not x.numel() or x.shape[-1] != self._C:
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors):
            return None
        C, dtype, shape = self._C, self._dtype, x.shape
        M, rows, starts, lengths = x.numel() // C, tokens.rows, tokens.starts, tokens.lengths
        if MOST_TOKENS[self._name] < M or not len(rows) == len(starts) == len(lengths):
            return None
        if min(lengths) < 1 or sum(lengths) != M or min(starts) < 0 or len(set(rows)) < len(rows):
            return None
        D = tokens.cos.shape[-1] if tokens.cos.ndim else 0
        angles = tokens.cos.numel() // D if D else 1
        if not self._angles <= {D} or (angles != M and set(lengths) != {angles}):
            return None
        placed = self._place(kept)
        if placed is None or min(rows) < 0 or max(rows) >= placed.rows:
            return None
        if max(map(operator.add, starts, lengths)) > placed.room:
            return None
        call.integers(M, C, placed.rows, len(rows), angles, D, self._work, len(self._parts))
        y = x.clone(memory_format=torch.contiguous_format)
        call.fit &= applies(x)
        call.packed(y, dtype, *shape)
        call.packed(tokens.embeds, dtype, *shape)
        call.packed(tokens.cos, dtype, *tokens.cos.shape)
        call.packed(tokens.sin, dtype, *tokens.cos.shape)
        firsts = accumulate(lengths, initial=0)
        of = array("q", chain.from_iterable(zip(rows, starts, lengths, firsts, strict=False)))
        call.integers(*_where(of), *_where(self._table), *_where(placed.table))
        return y if call.run(f"stack_{self._name}") else None

    def _place(self, kept: Sequence[Sequence[Tensor]]) -> "Placed | None":
        """Return where what the parts keep is; worked out anew if it is not the same."""
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
