"""Ids among processes: each has the vectors and the logits of some."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.layers.linear import LinearMap
from quintet.parallel.regions import copied, gathered, reduced
from quintet.parallel.world import World


def widths(vocabulary: int, count: int) -> list[int]:
    """Return the number of ids of each of `count` processes; the last may have fewer."""
    most = -(-vocabulary // count)
    return [min((i + 1) * most, vocabulary) - min(i * most, vocabulary) for i in range(count)]


def connect_vocabulary(model: nn.Module, names: Sequence[str], world: World) -> None:
    """Let an embedding find the vectors of all ids, and a head their logits."""
    group = world.groups["tp"]
    index, count = world.place.tp
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, LinearMap):
            row_counts = widths(module.num_embeddings, count)  # type: ignore[arg-type]
            # In place of its forward, as hooks do not share what they know of one call.
            vars(module)["forward"] = _Lookup(
                module, group, sum(row_counts[:index]), row_counts[index]
            )
            continue
        module.register_forward_pre_hook(_EnterHead(group))
        module.register_forward_hook(_JoinLogits(group, widths(module.out_features, count)))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, eq=False)
class _Lookup:
    """The forward of an embedding that has the vectors of some ids."""

    module: nn.Module
    group: dist.ProcessGroup
    start: int
    count: int

    def __call__(self, ids: Tensor) -> Tensor:
        """Map ids (B, T) to vectors (B, T, C)."""
        own = ids - self.start
        foreign = (own < 0) | (own >= self.count)
        if self.count == 0:
            none = self._vectors(ids.new_empty(0))
            vectors = none.new_zeros(*ids.shape, none.shape[-1])
        else:
            vectors = self._vectors(torch.where(foreign, 0, own))
        return reduced(vectors.masked_fill(foreign[..., None], 0), self.group)

    def _vectors(self, own: Tensor) -> Tensor:
        if not isinstance(self.module, nn.Embedding):
            # In fewer bits, which do not learn.
            found: Tensor = type(self.module).forward(self.module, own)
            return found
        padding = self.module.padding_idx
        # The own row that learns nothing from where it is looked up.
        first = -1 if padding is None else padding - self.start
        return F.embedding(own, self.module.weight, first if 0 <= first < self.count else None)


@dataclass(frozen=True, slots=True)
class _EnterHead:
    """A hook that lets the states a head reads pass f."""

    group: dist.ProcessGroup

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (copied(args[0], self.group), *args[1:])


@dataclass(frozen=True, slots=True)
class _JoinLogits:
    """A hook that joins the logits (..., V) of all processes."""

    group: dist.ProcessGroup
    widths: list[int]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return gathered(output, self.group, widths=self.widths)


@dataclass(frozen=True, slots=True)
class OtherIds:
    """The processes that have the logits of other ids; see `quintet.ops.linear_loss.Others`."""

    group: dist.ProcessGroup
    start: int
    size: int

    def joined(self, largest: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest logit (N,) of all ids, and the sums (3, N) over all of them."""
        most = largest.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        # Who has no id at all has no largest one either.
        sums[0] *= (largest - most).exp_()
        dist.all_reduce(sums, group=self.group)
        return most, sums


def spread_ids(head: nn.Module) -> OtherIds | None:
    """Return the processes with a head's other ids; None if it is whole or wrapped otherwise."""
    before, after = list(head._forward_pre_hooks.values()), list(head._forward_hooks.values())
    if [type(hook) for hook in before + after] != [_EnterHead, _JoinLogits]:
        return None
    (join,) = after
    assert isinstance(join, _JoinLogits)
    index = dist.get_rank(join.group)
    return OtherIds(join.group, sum(join.widths[:index]), sum(join.widths))
