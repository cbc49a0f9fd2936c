"""The places where an encoded matrix can be cut into shards.

A part lies over its matrix like a grid: an entry of it is of so many rows and columns. Ranges of
rows and columns that begin and end on the grid's lines are ranges of the part. A range within one
cell is too: its numbers have the same scale in two processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from quintet.parallel.placement import Range, Shard


@dataclass(frozen=True, slots=True)
class Grain:
    """The way in which a part (..., rows, columns) covers a matrix (..., O, I).

    Attributes:
        rows: of the matrix to a row of the part.
        columns: of the matrix to a cell of the part; None if it has no such dimension.
        width: numbers, or bytes, that a cell takes in the part.
        packed: whether a cell cannot be had in part.
    """

    rows: int = 1
    columns: int | None = 1
    width: int = 1
    packed: bool = False


def shards_by(grains: Mapping[str, Grain], shard: Shard) -> dict[str, Shard] | None:
    """Return the shard of each part for a shard of the matrix, or None if a cell is cut."""
    rows, columns = len(shard.shape) - 2, len(shard.shape) - 1
    found = {}
    for suffix, grain in grains.items():
        ranges = dict(shard.ranges)
        shape = [*shard.shape[:rows], -(-shard.shape[rows] // grain.rows)]
        cells = {rows: (grain.rows, 1)}
        if grain.columns is None:
            ranges.pop(columns, None)
        else:
            cells[columns] = (grain.columns, grain.width)
            shape.append(-(-shard.shape[columns] // grain.columns) * grain.width)
        for dim, (size, width) in cells.items():
            if dim in ranges:
                own_cells = _cells(ranges[dim], size, width, shard.shape[dim], grain.packed)
                if own_cells is None:
                    return None
                ranges[dim] = own_cells
        found[suffix] = Shard(tuple(shape), ranges, shard.zero)
    return found


def is_alone(grains: Mapping[str, Grain], shard: Shard) -> bool:
    """Return whether no cell of a part crosses a shard's border."""
    rows, columns = len(shard.shape) - 2, len(shard.shape) - 1
    for grain in grains.values():
        if grain.columns is None and columns in shard.ranges:
            return False
        for dim, size in ((rows, grain.rows), (columns, grain.columns or 1)):
            ranges = shard.ranges.get(dim, ())
            if not all(_on_lines(one, size, shard.shape[dim]) for one in ranges):
                return False
    return True


def _cells(
    ranges: tuple[Range, ...], size: int, width: int, total: int, packed: bool
) -> tuple[Range, ...] | None:
    """Return a part's ranges along a dimension in which `size` entries cover `width`."""
    inside = len(ranges) == 1 and not packed and _in_one(ranges[0], size)
    if not inside and not all(_on_lines(one, size, total) for one in ranges):
        return None
    return tuple((a // size * width, -(-b // size) * width) for a, b in ranges)


def _on_lines(one: Range, size: int, total: int) -> bool:
    first, last = one
    return first == last or (first % size == 0 and (last % size == 0 or last == total))


def _in_one(one: Range, size: int) -> bool:
    first, last = one
    return first < last and first // size == (last - 1) // size
