"""Decoder layers for few tokens, in one call."""

import ctypes
import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from quintet.kernels.linear import kernel_name
from quintet.kernels.native import POINTER, applies, entry, pointers
from quintet.kernels.parts import Fields, Part, Tokens, readable

__all__ = ["Stack"]

# Beyond so many tokens, calls of their own cost little beside what the layers compute.
MOST_TOKENS: Mapping[str, int] = MappingProxyType(
    {"bf16": 16, "f32": 16, "int8_bf16": 8, "int8_f32": 8, "int4_bf16": 8, "int4_f32": 8}
)


class Placed(NamedTuple):
    """Where what parts keep between steps is.

    Attributes:
        rows: B.
        tensors: what is kept.
        room: how many slots there are for keys and values.
        fields: what the parts have written.
        table: for each part the address of its fields.
    """

    rows: int
    tensors: list[Tensor]
    room: int
    fields: "ctypes.Array[ctypes.c_int64]"
    table: "ctypes.Array[ctypes.c_int64]"


class Stack:
    """Parts of layers as the kernel reads them: checked, and their addresses taken down once.

    It holds on to the weights it was made of, which it reads whatever the modules hold by then.
    """

    def __init__(self, parts: Sequence[Part], written: Sequence[Fields], name: str, C: int) -> None:
        self._parts, self._name, self._C = tuple(parts), name, C
        self._dtype = written[0].dtype
        self._tensors = [tensor for fields in written for tensor in fields.tensors]
        self._fields = [pointers(fields.numbers) for fields in written]
        rows: list[int] = []
        for part, array in zip(parts, self._fields, strict=True):
            rows += (part.number, ctypes.addressof(array))
        self._table = pointers(rows)
        self._angles = frozenset[int]().union(*(fields.angles for fields in written))
        self._placed: Placed | None = None
        self._work = max(sum(x.numel() for x in fields.tensors) for fields in written)

    @classmethod
    def of(cls, parts: Sequence[Part], C: int, dtype: torch.dtype) -> Self | None:
        """Return parts for hidden states (B, T, C) of a dtype; None where the kernel cannot."""
        written = []
        kind: torch.dtype | None = None
        for part in parts:
            fields = Fields(dtype)
            fields.kind = kind
            part.write(fields, C)
            if not readable(fields):
                return None
            kind = fields.kind
            written.append(fields)
        name = "" if kind is None else kernel_name(kind, dtype)
        return cls(parts, written, name, C) if name in MOST_TOKENS else None

    def run(self, x: Tensor, tokens: Tokens, kept: Sequence[Sequence[Tensor]]) -> Tensor | None:
        """Return what the parts make of x (B, T, C), the last one's sum; None if they cannot.

        Args:
            kept: for each part what it keeps between steps, changed in place. Row b's tokens take
                the slots of keys and values from `tokens.starts[b]` on.
        """
        B, T, C = x.shape
        cos, sin, embeds, counts = tokens.cos, tokens.sin, tokens.embeds, tokens.counts
        # Asked before the library is: a compiler that traces this must not look into it.
        if not 0 < B * T <= MOST_TOKENS[self._name] or not applies(x, cos, sin, embeds):
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors):
            return None
        function = entry(f"quintet_stack_{self._name}", POINTER)
        if function is None or self._C != C or len(tokens.starts) != B:
            return None
        if cos.shape != sin.shape or cos.shape[:2] not in ((1, T), (B, T)):
            return None
        if not self._angles <= {cos.shape[2]} or embeds.shape != x.shape:
            return None
        if any(t.dtype != self._dtype for t in (x, cos, sin, embeds)):
            return None
        if not all(t.is_contiguous() for t in (cos, sin, embeds)):
            return None
        placed = self._place(kept, B)
        if placed is None or max(tokens.starts) + T > placed.room:
            return None
        y = x.clone(memory_format=torch.contiguous_format)
        starts = pointers(tokens.starts)
        counted = None if counts is None else pointers(counts.tolist())
        call = (
            y.data_ptr(),
            embeds.data_ptr(),
            0,
            cos.data_ptr(),
            sin.data_ptr(),
            ctypes.addressof(starts),
            0 if counted is None else ctypes.addressof(counted),
            cos.stride(0) if len(cos) > 1 else 0,
            B,
            T,
            C,
            ctypes.addressof(self._table),
            ctypes.addressof(placed.table),
            len(self._parts),
            self._work,
        )
        function(pointers(call))
        return y

    def _place(self, kept: Sequence[Sequence[Tensor]], B: int) -> "Placed | None":
        """Return where B rows of what the parts keep are; worked out anew if it is not the same."""
        tensors = [tensor for part in kept for tensor in part]
        last = self._placed
        # Neither shape nor address of a tensor changes while it is the same.
        same = last is not None and last.rows == B and len(last.tensors) == len(tensors)
        if last is not None and same and all(map(operator.is_, last.tensors, tensors)):
            return last
        held = Fields(self._dtype)
        places = []
        for part, own in zip(self._parts, kept, strict=True):
            places.append(len(held.numbers))
            part.held(own, held, B)
        if not readable(held):
            return None
        fields = pointers(held.numbers)
        base = ctypes.addressof(fields)
        table = pointers([base + 8 * place for place in places])
        # Another thread may put its own there before this one returns.
        placed = self._placed = Placed(B, tensors, held.room, fields, table)
        return placed
