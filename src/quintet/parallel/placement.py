"""The part of a tensor that a process holds; needs no processes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quintet.errors import InputError, shown
from quintet.sharding import Axis, Cut, Section, Shardable, Sharding

Range = tuple[int, int]
# Of a model's numbers, the share that may lie whole on every process, and how many may at any rate.
MOST_WHOLE, FEW = 0.1, 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A process's rank and the size along each axis."""

    tp: tuple[int, int] = (0, 1)
    ep: tuple[int, int] = (0, 1)
    etp: tuple[int, int] = (0, 1)

    def along(self, axis: Axis) -> tuple[int, int]:
        """Return this process's index along an axis, and the number of processes."""
        return {"tp": self.tp, "ep": self.ep, "etp": self.etp}[axis]


@dataclass(frozen=True, slots=True)
class Common:
    """A stretch of a part that other processes along tp have too: their gradients add up.

    Attributes:
        dim: which dimension it is a stretch of.
        range: from where to where, within the part.
        unit: which of the units this is that are given to several processes each.
        units: how many these are.
    """

    dim: int
    range: Range
    unit: int
    units: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A process's part of a tensor.

    Attributes:
        shape: of the whole tensor.
        ranges: for each dimension that is cut, the ranges of it that the process has, in order.
        zero: whether it has zeros in place of all of that.
        common: what of it others have too, each with a part of the gradient.
    """

    shape: tuple[int, ...]
    ranges: Mapping[int, tuple[Range, ...]]
    zero: bool = False
    common: tuple[Common, ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the process's part."""
        return tuple(
            sum(end - start for start, end in self.ranges[dim]) if dim in self.ranges else size
            for dim, size in enumerate(self.shape)
        )

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.local_shape)

    @property
    def whole(self) -> bool:
        """Whether the process has all of it, in its order."""
        if self.zero or self.local_shape != self.shape:
            return False
        return all(list(ranges) == sorted(set(ranges)) for ranges in self.ranges.values())

    def of(self, tensor: Tensor) -> Tensor:
        """Return the process's part of a whole tensor: a view if it is one piece."""
        if self.zero:
            return torch.zeros_like(tensor)
        for dim, ranges in self.ranges.items():
            pieces = [tensor.narrow(dim, start, end - start) for start, end in ranges]
            tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        return tensor

    def rows(self, start: int, end: int) -> "Shard":
        """Return the shard of the rows from `start` to `end` of this part."""
        found, position = [], 0
        for first, last in self.ranges.get(0, ((0, self.shape[0]),)):
            own = max(start - position, 0), min(end - position, last - first)
            if own[0] < own[1]:
                found.append((first + own[0], first + own[1]))
            position += last - first
        return replace(self, ranges={**self.ranges, 0: tuple(found) or ((0, 0),)}, common=())

    def piece(self, index: int, rows: slice) -> tuple["Shard", tuple[int, slice]] | None:
        """Return the part of some rows of a matrix of a stack (E, O, I), and its place.

        Returns what it has of these rows, and its own index of the matrix and of the rows; None
        where it has nothing of them.
        """
        own = index
        if 0 in self.ranges:
            owned = [i for start, end in self.ranges[0] for i in range(start, end)]
            if index not in owned:
                return None
            own = owned.index(index)
        ranges = {dim - 1: found for dim, found in self.ranges.items() if dim > 1}
        first, last = rows.start, rows.stop
        if 1 in self.ranges:
            clipped = [(max(a, rows.start), min(b, rows.stop)) for a, b in self.ranges[1]]
            ranges[0] = tuple((a - rows.start, b - rows.start) for a, b in clipped if a < b)
            if not ranges[0]:
                return None
            before = [min(b, rows.start) - a for a, b in self.ranges[1] if a < rows.start]
            first = sum(before)
            last = first + sum(b - a for a, b in ranges[0])
        shape = (rows.stop - rows.start, *self.shape[2:])
        return Shard(shape, ranges, self.zero), (own, slice(first, last))

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Write the process's part into a whole tensor."""
        if self.zero:
            return
        for source, target in self._blocks():
            whole[target].copy_(part[source])

    def _blocks(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Yield each block of the part, and where it is in the whole."""
        found: list[tuple[tuple[slice, ...], tuple[slice, ...]]] = [((), ())]
        for dim, size in enumerate(self.shape):
            places, position = [], 0
            for start, end in self.ranges.get(dim, ((0, size),)):
                places.append((slice(position, position + end - start), slice(start, end)))
                position += end - start
            found = [((*s, a), (*t, b)) for s, t in found for a, b in places]
        yield from found


def table_of(model: nn.Module) -> Sharding:
    """Join the tables of a model's modules; for one parameter, the outer module's holds.

    What several share has the first of its names.
    """
    table = Sharding()
    for path, module in model.named_modules():
        if isinstance(module, Shardable):
            table = table | module.sharding().below(f"{path}." if path else "")
    return table


def seated(sharding: Sharding, seats: Mapping[str, Sequence[int]], count: int) -> Sharding:
    """Return a table by which `count` processes have the experts that stand at their seats.

    Args:
        sharding: the table of a model.
        seats: for stacks of experts, by the names of their modules, which expert is at each seat.
        count: of processes, each of which gets equally many seats.

    Raises:
        InputError: there is no such stack, an expert is missing, or seats cannot be given out.
    """
    parameters = dict(sharding.parameters)
    for path, order in seats.items():
        names = [
            name
            for name, cuts in parameters.items()
            if name.startswith(f"{path}.") and cuts and cuts[0].axis == "ep"
        ]
        if not names:
            raise InputError(f"seats of {shown(path)}: the model has no such stack of experts")
        for name in names:
            (stack, *more) = parameters[name]
            (experts,) = stack.sections
            _check_seats(path, tuple(order), experts.count, count)
            section = replace(experts, order=tuple(order))
            parameters[name] = (replace(stack, sections=(section,)), *more)
    orders = {path: tuple(order) for path, order in seats.items()}
    return replace(sharding, parameters=parameters, seats={**sharding.seats, **orders})


def _check_seats(path: str, order: tuple[int, ...], experts: int, count: int) -> None:
    if set(order) != set(range(experts)):
        raise InputError(
            f"seats of {path} are {shown(order)}; each of its {experts} experts, 0 to "
            f"{experts - 1}, has to have one or more"
        )
    size, rest = divmod(len(order), count)
    if rest:
        raise InputError(
            f"{len(order)} seats of {path} cannot be given to {count} processes evenly"
        )
    for start in range(0, len(order), size):
        if len(set(order[start : start + size])) < size:
            raise InputError(
                f"seats {start} to {start + size - 1} of {path} are one process's, and have an "
                f"expert twice: {shown(order[start : start + size])}"
            )


def place(
    names: Mapping[str, tuple[int, ...]], sharding: Sharding, process: Place
) -> dict[str, Shard]:
    """Return a process's shard of each tensor of a model, by its name and whole shape.

    Raises:
        InputError: units cannot be given out evenly, or the table says nothing of a tensor.
    """
    found = {}
    first_only, partial = set(sharding.first_only), set(sharding.partial)
    for name, shape in names.items():
        shard = shard_of(name, shape, cuts_of(name, sharding), process)
        if name in first_only and process.tp[0] > 0:
            shard = replace(shard, zero=True)
        if name in partial and process.tp[1] > 1:
            # Of experts, those alone have parts of a gradient that have the same ones.
            apart = any(cut.axis == "ep" for cut in cuts_of(name, sharding))
            unit, units = process.ep if apart else (0, 1)
            if units < process.tp[1]:
                rows = (0, shard.local_shape[0])
                shard = replace(shard, common=(*shard.common, Common(0, rows, unit, units)))
        found[name] = shard
    return found


def check_cut(shards: Mapping[str, Shard]) -> None:
    """Check that a model is cut by its layers' tables, and is not whole on every process.

    Raises:
        InputError: more than a tenth of its numbers do.
    """
    sizes = {name: math.prod(shard.shape) for name, shard in shards.items()}
    whole = [name for name, shard in shards.items() if shard.whole]
    total, replicated = sum(sizes.values()), sum(sizes[name] for name in whole)
    if replicated <= max(MOST_WHOLE * total, FEW):
        return
    largest = sorted(whole, key=lambda name: -sizes[name])[:3]
    raise InputError(
        f"{replicated} of the model's {total} numbers ({replicated / total:.0%}) would lie whole "
        f"on every process, the largest in {', '.join(largest)}; cut them in the sharding() of "
        "their layers, or use fewer processes"
    )


def cuts_of(name: str, sharding: Sharding) -> tuple[Cut, ...]:
    """Return the cuts of a tensor.

    Raises:
        InputError: the table says nothing of it.
    """
    if name not in sharding.parameters:
        raise InputError(f"no module says how {name} is cut among processes")
    return sharding.parameters[name]


def shard_of(name: str, shape: tuple[int, ...], cuts: tuple[Cut, ...], process: Place) -> Shard:
    """Return a process's shard of one tensor.

    Raises:
        InputError: units cannot be given out evenly, or are not what the tensor consists of.
    """
    ranges: dict[int, tuple[Range, ...]] = {}
    common: list[Common] = []
    for cut in cuts:
        index, count = process.along(cut.axis)
        if count == 1:
            continue
        width = sum(section.count * section.width for section in cut.sections)
        assert width == shape[cut.dim], f"{name} {shape} is not {cut.sections} along {cut.dim}"
        assert cut.dim not in ranges, f"{name} is cut twice along {cut.dim}"
        found: list[Range] = []
        start = own = 0
        for section in cut.sections:
            if section.order is not None:
                per_process = len(section.order) // count
                units = section.order[index * per_process : (index + 1) * per_process]
                found += [(u * section.width, (u + 1) * section.width) for u in units]
                continue
            first, last = _units(section, index, count, cut.axis)
            found.append((start + first * section.width, start + last * section.width))
            start += section.count * section.width
            size = (last - first) * section.width
            if section.shared and section.count < count:
                common.append(Common(cut.dim, (own, own + size), first, section.count))
            own += size
        ranges[cut.dim] = tuple(found)
    return Shard(shape, ranges, common=tuple(common))


def _units(section: Section, index: int, count: int, axis: Axis) -> Range:
    """Return the units of a section that process `index` of `count` has."""
    units = section.count
    if section.uneven:
        most = -(-units // count)
        return min(index * most, units), min((index + 1) * most, units)
    if units % count == 0:
        size = units // count
        return index * size, (index + 1) * size
    if section.shared and count % units == 0:
        own = index * units // count
        return own, own + 1

    def even(n: int) -> bool:
        return units % n == 0 or (section.shared and n % units == 0)

    near = [str(n) for n in range(1, 2 * count + 1) if even(n)]
    raise InputError(
        f"{section.key}={units} cannot be given to {axis}={count} processes evenly; "
        f"{axis} may be {', '.join(near)}"
    )
