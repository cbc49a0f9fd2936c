"""Weights as kernels read them: plain, or integers in three layouts."""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.kernels.calls import Call

GROUP = 64


class Matrix(NamedTuple):
    """A weight (O, I) and a bias (O).

    Attributes:
        weight: plain (O, I); int8 (O, I); or uint8 (O, ceil(I / 64) · 32), 4 bits each.
        scale: of int8, float32 (O,); of int4, bfloat16 (O, ceil(I / 64)); of other groups
            (O, G), see `quintet.ops.groups`; None of plain ones.
        bias: (O,) in the dtype of the vectors.
        offset: what is added to the numbers of a group, as the scale.
        iq4: whether numbers of 4 bits are places in a table.
        block: of e4m3 numbers, of how many rows and columns each number of `scale` is, in float32
            (ceil(O / rows), ceil(I / columns)).
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    offset: Tensor | None = None
    iq4: bool = False
    block: tuple[int, int] | None = None

    def rows(self, rows: slice | tuple[slice, slice]) -> "Matrix":
        """Return some rows; of a stack (E, O, I), rows of some experts."""
        assert self.block is None, "rows of blocks are cut where their scales are"
        weight, scale, bias, offset = (x if x is None else x[rows] for x in self[:4])
        assert weight is not None
        return Matrix(weight, scale, bias, offset, self.iq4)


class Kind(StrEnum):
    """The storage of a weight, named as in kernel names."""

    PLAIN = ""
    INT8 = "int8_"
    INT4 = "int4_"
    GROUPS = "groups_"
    BLOCKS = "blocks_"


def kind_of(matrix: Matrix) -> Kind:
    """Return the storage of a weight or stack."""
    weight, scale, _, offset, iq4, block = matrix
    if scale is None:
        return Kind.PLAIN
    if block is not None:
        return Kind.BLOCKS
    if offset is None and not iq4:
        if weight.dtype == torch.int8 and scale.ndim < weight.ndim:
            return Kind.INT8
        whole = weight.shape[-1] == scale.shape[-1] * GROUP // 2
        if weight.dtype == torch.uint8 and scale.dtype == torch.bfloat16 and whole:
            return Kind.INT4
    return Kind.GROUPS


def common_kind(matrices: Sequence[Matrix]) -> Kind:
    """Return the common storage of several weights.

    Kernels of groups read integers of all kinds.
    """
    kinds = {kind_of(matrix) for matrix in matrices}
    return kinds.pop() if len(kinds) == 1 else Kind.GROUPS


# As csrc/groups.h numbers them.
BYTES, NIBBLES, IQ4 = range(3)
REALS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


def power_of_groups(columns: int, count: int) -> int | None:
    """Return the group size if it is a power of two from 16 on, else None.

    One group is of as many as the row has, or more. None stands for no such number.
    """
    size = 16
    while size < columns and -(-columns // size) > count:
        size *= 2
    return size if -(-columns // size) == count else None


class Integers(NamedTuple):
    """The expected layout of an integer weight, for kernels.

    Attributes:
        numbers: the dtype of the weight.
        columns: how many of those a row has.
        told: a number for the kernel: how groups lie (csrc/groups.h), or `columns`.
        real: the dtype of scales and offsets.
        groups: the shape of what a row has of them.
    """

    numbers: torch.dtype
    columns: int
    told: int
    real: torch.dtype
    groups: tuple[int, ...]


def integers(matrix: Matrix, kind: Kind, I: int) -> Integers | None:
    """Return the layout of a weight for vectors (..., I), or None."""
    weight, scale, _, _, iq4, block = matrix
    if block is not None:
        return None
    packed = -(-I // GROUP) * GROUP // 2
    if kind is not Kind.GROUPS:
        if kind_of(matrix) is not kind:
            return None
        if kind is Kind.INT8:
            return Integers(torch.int8, I, I, torch.float32, ())
        return Integers(torch.uint8, packed, packed, torch.bfloat16, (packed * 2 // GROUP,))
    if scale is None or scale.dtype not in REALS:
        return None
    row = scale.ndim < weight.ndim
    group = power_of_groups(I, 1 if row else scale.shape[-1])
    if group is None:
        return None
    if row or scale.shape[-1] == 1:
        # However long the row is.
        group = max(group, GROUP)
    bytes_ = weight.dtype == torch.int8
    numbers = BYTES if bytes_ else IQ4 if iq4 else NIBBLES
    told = numbers + 16 * REALS[scale.dtype] + 256 * group
    groups = () if row else (scale.shape[-1],)
    dtype = torch.int8 if bytes_ else torch.uint8
    return Integers(dtype, I if bytes_ else packed, told, scale.dtype, groups)


def write(
    call: Call, matrix: Matrix | None, kind: Kind, dtype: torch.dtype, O: int, I: int
) -> None:
    """Write a matrix from (..., I) to (..., O) for vectors of a dtype; zeros for None.

    Args:
        kind: how the matrices of the call are held.
    """
    if matrix is None:
        call.integers(*[0] * 10)
        return
    weight, scale, bias, offset = matrix[:4]
    if kind is Kind.PLAIN:
        call.rows(weight, dtype, O, I)
        call.fit &= scale is None
        call.integers(0, 0, 0, 0)
    else:
        held = integers(matrix, kind, I)
        if held is None:
            call.fit = False
            return
        call.packed(weight, held.numbers, O, held.columns)
        call.integers(held.told)
        call.packed(scale, held.real, O, *held.groups)
        call.packed(offset, held.real, O, *held.groups)
    call.packed(bias, dtype, O)
    call.integers(O)


def write_stack(
    call: Call, matrix: Matrix, kind: Kind, dtype: torch.dtype, O: int, I: int, E: int | None
) -> None:
    """Write E matrices (E, O, I), or a single one (O, I), for vectors of a dtype.

    Args:
        kind: how the matrices of the call are held.
    """
    weight, scale, bias, offset = matrix[:4]
    call.fit &= bias is None
    if kind is Kind.PLAIN:
        call.fit &= scale is None
        call.rows(weight, dtype, *(() if E is None else (E,)), O, I, axes=2)
        call.integers(0, 0, 0, 0, 0, 0)
        return
    held = integers(matrix, kind, I)
    if held is None:
        call.fit = False
        return
    of_groups = (scale, offset)
    if E is None:
        call.packed(weight, held.numbers, O, held.columns)
        call.integers(0, held.told)
        for one in of_groups:
            call.packed(one, held.real, O, *held.groups)
            call.integers(0)
        return
    call.stack(weight, held.numbers, E, O, held.columns)
    call.integers(held.told)
    # Steps of what has several types are in bytes.
    unit = held.real.itemsize if kind is Kind.GROUPS else 1
    for one in of_groups:
        if one is None:
            call.integers(0, 0, 0)
        else:
            call.stack(one, held.real, E, O, *held.groups, unit=unit)
