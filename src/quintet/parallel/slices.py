"""The rows of each parameter that FSDP leaves to a process, computed beforehand."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from quintet.parallel.placement import Shard
from quintet.parallel.vocabulary import widths
from quintet.parallel.world import World
from quintet.sharding import Sharding


@dataclass(frozen=True, slots=True)
class ParameterSlices:
    """The row ranges of a model's parameters on each process.

    Attributes:
        world: the processes.
        every: whether those of all dtypes are sliced, not only those of the one that most have.
    """

    world: World
    every: bool

    def of(
        self,
        dtypes: Mapping[str, torch.dtype],
        model: nn.Module,
        shards: Mapping[str, Shard],
        sharding: Sharding,
    ) -> dict[str, Shard]:
        """Return this process's part of each tensor, from its part without slices.

        Args:
            dtypes: of its parameters, by all their names.
            model: without memory, and whole.
            shards: what tp and ep leave of its tensors, by all their names.
            sharding: its table.
        """
        kinds = Counter(dtypes[name] for name, _ in model.named_parameters())
        most = kinds.most_common(1)[0][0]
        apart = experts_apart(sharding, self.world)
        found = dict(shards)
        for name, _ in model.named_parameters(remove_duplicate=False):
            if name in shards and (self.every or dtypes[name] == most):
                axis = "copies" if name in apart else "fsdp"
                rows = shards[name].local_shape[0]
                found[name] = shards[name].rows(*own_rows(rows, axis, self.world))
        return found


def own_rows(rows: int, axis: str, world: World) -> tuple[int, int]:
    """Return this process's range of rows that are divided along an axis."""
    bounds = [0, *accumulate(widths(rows, world.degrees.of(axis)))]
    index = world.coordinates[axis]
    return bounds[index], bounds[index + 1]


def experts_apart(sharding: Sharding, world: World) -> frozenset[str]:
    """Return the parameters that processes with other batches have parts of: experts beyond tp.

    What these learn from, they were sent from all that share them; only "copies" have more.
    """
    if world.degrees.ep <= world.degrees.tp:
        return frozenset()
    return frozenset(
        name for name, cuts in sharding.parameters.items() if any(cut.axis == "ep" for cut in cuts)
    )
