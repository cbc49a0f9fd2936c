"""A model that is trained by several processes: where its numbers are, and how they add up."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quintet.parallel.apply import shard_model
from quintet.parallel.fsdp import Root
from quintet.parallel.gathering import to_first
from quintet.parallel.gradients import sum_common
from quintet.parallel.pipeline import Pipeline
from quintet.parallel.placement import Common, Shard, place, table_of
from quintet.parallel.regions import gathered
from quintet.parallel.slices import experts_apart, own_rows
from quintet.parallel.vocabulary import widths
from quintet.parallel.world import World
from quintet.sharding import Sharding

T = TypeVar("T")

# Along these axes batches differ, and along these what is read of them, too: gradients and what
# is found are parts of a sum.
BATCHES = ("dp", "fsdp")
DATA = (*BATCHES, "cp")
# How many numbers are summed by one call.
AT_ONCE = 1 << 24


def add_up(tensor: Tensor, world: World, axes: Sequence[str] = DATA) -> Tensor:
    """Return a tensor, in place, as the sum over all processes along some axes."""
    for axis in axes:
        if (group := world.groups.get(axis)) is not None:
            dist.all_reduce(tensor, group=group)
    return tensor


class Parts:
    """The part of each tensor on each process along tp and ep.

    Attributes:
        own: what this process has.
        apart: the experts that processes with other batches have parts of.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], table: Sharding, world: World
    ) -> None:
        """Make the parts for the shapes of a model that is whole."""
        self._world, self._first_only = world, frozenset(table.first_only)
        self.apart = experts_apart(table, world)
        self.own = place(shapes, table, world.place)
        self._all = {"tp": self._along("tp", shapes, table)}
        if self.apart:
            experts = {name: shape for name, shape in shapes.items() if name in self.apart}
            self._all["ep"] = self._along("ep", experts, table)

    def _along(
        self, axis: str, shapes: Mapping[str, tuple[int, ...]], table: Sharding
    ) -> list[dict[str, Shard]]:
        """Return the shards of each process along an axis, in their order."""
        world = self._world
        group = world.groups.get(axis)
        ranks = [world.rank] if group is None else dist.get_process_group_ranks(group)
        return [place(shapes, table, world.degrees.place(rank)) for rank in ranks]

    @classmethod
    def of(cls, model: nn.Module, world: World, table: Sharding | None = None) -> "Parts":
        """Make the parts for a whole model, which may have no memory."""
        saved = model.state_dict(keep_vars=True)
        named = [*model.named_parameters(), *model.named_buffers()]
        shapes = {name: tuple(tensor.shape) for name, tensor in named if name in saved}
        return cls(shapes, table or table_of(model), world)

    @classmethod
    def cut(cls, model: nn.Module, world: World, table: Sharding | None = None) -> "Parts":
        """Make a whole model this process's part of it, by its own table or another."""
        parts = cls.of(model, world, table)
        shard_model(model, world, table=table)
        return parts

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor of which each process has a part."""
        own, axis = self.own[name], "ep" if name in self.apart else "tp"
        of_all = [shards[name] for shards in self._all[axis]]
        if all(shard.whole for shard in of_all):
            return part
        most = max(shard.numel for shard in of_all)
        flat = part.new_zeros(most)
        flat[: part.numel()] = part.flatten()
        gathered_parts = [torch.empty_like(flat) for _ in of_all]
        dist.all_gather(gathered_parts, flat, group=self._world.groups[axis])
        whole = part.new_empty(own.shape)
        for shard, numbers in zip(of_all, gathered_parts, strict=True):
            shard.put(whole, numbers[: shard.numel].view(shard.local_shape))
        return whole

    def cuts(self, name: str) -> tuple[int, ...]:
        """Return along which dimensions this process has a part of a tensor."""
        own = self.own[name]
        return () if own.whole else tuple(own.ranges)

    def squared(self, name: str, gradient: Tensor, common: Sequence[Common]) -> Tensor:
        """Return this process's part of a gradient's squared norm; replicated parts count once."""
        squared = _squared(gradient)
        if name in self.apart:
            return squared
        copies = self._world.degrees.tp
        if self.own[name].zero or name in self._first_only:
            return squared
        if self.own[name].whole and not common:
            return squared / copies
        for one in common:
            start, end = one.range
            stretch = _squared(gradient.narrow(one.dim, start, end - start))
            squared = squared - stretch * (1 - one.units / copies)
        return squared


class ParallelLayout:
    """A model of which each process has a part, or which each has to train with its own batches.

    Args:
        model: this process's part.
        world: the processes.
        parts: what of each tensor it is a part of, if it was cut along tp.
        root: what the model is run through, if it was divided by FSDP.
        low: whether it is gathered in bfloat16.
        pipeline: what trains it, if it has some of the layers.
        whole_model: in that case, all of the model, without memory.
        partial: the parameters that learn from a slice of the tokens along tp.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        parts: Parts | None = None,
        root: Root | None = None,
        *,
        low: bool = False,
        pipeline: Pipeline | None = None,
        whole_model: nn.Module | None = None,
        partial: Collection[str] = (),
    ) -> None:
        self.world, self.parts, self.root, self.pipeline = world, parts, root, pipeline
        self.whole_model, self._partial = whole_model, frozenset(partial)
        self._apart = frozenset() if parts is None else parts.apart
        self.rounds = low and root is not None
        # The sizes of the first dimension of what FSDP divides.
        self._rows = {
            name: parameter.shape[0]
            for name, parameter in model.named_parameters()
            if root is not None and _is_divided(parameter)
        }

    def run(self, call: Callable[[], T]) -> T:
        """Return the result of a call that runs the model."""
        if self.root is None:
            return call()
        found: T
        if self.pipeline is None:
            found = self.root(call)
        else:
            # Gradients come back through the states that leave it, too.
            stage = self.pipeline.stage
            found, _ = self.root(lambda: (call(), stage.outgoing))
        if not torch.is_grad_enabled() and self.world.degrees.fsdp > 1:
            # What is kept for a backward that does not come would be old after the next step.
            self.root.reshard()  # type: ignore[operator]
        return found

    def learn(self, parts: Sequence[Callable[[], Tensor | None]], sizes: Sequence[int]) -> None:
        """Accumulate the gradients of a step's parts, those found in this process.

        Where processes have other layers, all their parts have to be of the same sizes.
        """
        if self.pipeline is not None:
            self.pipeline.run(lambda number: parts[number](), sizes)
            return
        for part in parts:
            if (loss := part()) is not None:
                loss.backward()  # type: ignore[no-untyped-call]

    @property
    def awaited(self) -> frozenset[str]:
        """The parameters of which `add_up` wants a gradient: other stages have them, too."""
        return frozenset() if self.pipeline is None else self.pipeline.shared

    def counts(self, name: str) -> bool:
        """Return whether a tensor that is here counts here, and not in a stage that has it, too."""
        return self.pipeline is None or self.pipeline.counts(name)

    def elsewhere(self, name: str) -> bool:
        """Return whether only other stages have a tensor."""
        return self.pipeline is not None and self.pipeline.elsewhere(name)

    def collected(self, own: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield named tensors, and in the first process behind them those of other stages."""
        if self.pipeline is None:
            yield from own
        else:
            yield from to_first(own, self.world)

    def local(self, tensor: Tensor) -> Tensor:
        """Return this process's part of a parameter or its gradient, without a copy."""
        if not _is_divided(tensor):
            return tensor
        with torch.no_grad():
            return tensor.to_local()  # type: ignore[attr-defined, no-any-return]

    @torch.no_grad()
    def add_up(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum the gradients of tensors that several processes have, as far as FSDP did not."""
        summed: dict[tuple[str, ...], list[Tensor]] = {}
        for name, x in gradients.items():
            summed.setdefault(self._unsummed(name), []).append(x)
        for axes, tensors in summed.items():
            if any(axis in self.world.groups for axis in axes):
                self._add_all(tensors, axes)
        if slices := [x for name, x in gradients.items() if name in self._partial]:
            self._add_all(slices, ("tp",))
        if self.pipeline is not None:
            self.pipeline.add_up(gradients)
        if self.parts is None:
            return
        for name, gradient in gradients.items():
            if self.parts.own[name].zero:
                gradient.zero_()
        shared = [
            (x.narrow(common.dim, common.range[0], common.range[1] - common.range[0]), common)
            for name, x in gradients.items()
            for common in self._common(name)
        ]
        if shared:
            sum_common(shared, self.world.groups["tp"])

    def _unsummed(self, name: str) -> tuple[str, ...]:
        """Return along which axes gradients of a parameter are not added up when they are there."""
        if name in self._apart:
            # What experts were sent from others is in them; FSDP has its mesh of dp and copies.
            return () if name in self._rows else ("dp", "copies")
        return ("cp",) if name in self._rows else DATA

    def _add_all(self, tensors: Sequence[Tensor], axes: Sequence[str]) -> None:
        """Make of tensors their sums over all processes along some axes, in place."""
        for bucket in _buckets(tensors):
            total = torch.cat([x.flatten() for x in bucket])
            add_up(total, self.world, axes)
            parts = torch.split(total, [x.numel() for x in bucket])
            for x, part in zip(bucket, parts, strict=True):
                x.copy_(part.view_as(x))

    @torch.no_grad()
    def norms(self, groups: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Return the norm of each group of tensors, by their parameters, over all processes."""
        # Of slices, and of what is none.
        zeros = torch.zeros(2, len(groups), dtype=torch.float64, device=self.world.device)
        most, experts = zeros, zeros.clone()
        for i, group in enumerate(groups):
            for name, x in group.items():
                if not self.counts(name):
                    continue
                known = self.parts is not None and self.parts
                squared = known.squared(name, x, self._common(name)) if known else _squared(x)
                sums = experts if name in self._apart else most
                sums[0 if name in self._rows else 1, i] += squared
        total = self._over_all(most, "fsdp", "tp")
        if self._apart:
            total = total + self._over_all(experts, "copies", "ep")
        return list(add_up(total, self.world, ("pp",)).sqrt().float())

    def _over_all(self, sums: Tensor, rows: str, parts: str) -> Tensor:
        """Sum (2, n) values of slices and others over processes with other rows and parts."""
        return add_up(add_up(sums[0], self.world, (rows,)) + sums[1], self.world, (parts,))

    def apart(self, name: str, tensor: Tensor) -> bool:
        """Return whether any one matrix of a parameter lies in several processes."""
        if self.parts is not None and any(
            dim > 0 or tensor.ndim < 3 for dim in self.parts.cuts(name)
        ):
            return True
        return name in self._rows and tensor.ndim < 3

    @torch.no_grad()
    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """Return the whole of a tensor that lies as a parameter does."""
        if name in self._rows and (group := self.world.groups.get(self._axis(name))) is not None:
            rows_of_each = widths(self._rows[name], self.world.degrees.of(self._axis(name)))
            tensor = gathered(tensor, group, widths=rows_of_each, dim=0)
        return tensor if self.parts is None else self.parts.whole(name, tensor)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return this process's part of a whole tensor."""
        if self.parts is not None:
            tensor = self.parts.own[name].of(tensor)
        start, end = self._slice(name, len(tensor))
        return tensor.narrow(0, start, end - start)

    def _slice(self, name: str, rows: int) -> tuple[int, int]:
        """Return the start and end of this process's rows, within its part along tp."""
        if name not in self._rows:
            return 0, rows
        return own_rows(self._rows[name], self._axis(name), self.world)

    def _axis(self, name: str) -> str:
        """Return the axis that a parameter's rows are divided along."""
        return "copies" if name in self._apart else "fsdp"

    def _common(self, name: str) -> list[Common]:
        """Return the ranges of this process's part that others along tp have, too."""
        found = []
        assert self.parts is not None
        for one in self.parts.own[name].common:
            start, end = one.range
            if one.dim == 0 and name in self._rows:
                first, last = self._slice(name, self._rows[name])
                start, end = max(start, first) - first, min(end, last) - first
            if start < end:
                found.append(replace(one, range=(start, end)))
        return found


def _squared(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm.double().square()


def _is_divided(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype, of not too many numbers together."""
    waiting: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = waiting.setdefault(tensor.dtype, [])
        if bucket and sum(x.numel() for x in bucket) + tensor.numel() > AT_ONCE:
            yield waiting.pop(tensor.dtype)
            bucket = waiting.setdefault(tensor.dtype, [])
        bucket.append(tensor)
    yield from waiting.values()
