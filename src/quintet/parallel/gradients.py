"""Sums of the partial gradients of parameters that several processes share."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quintet.parallel.placement import Common, Shard


@torch.no_grad()
def sum_partial(model: nn.Module, shards: Mapping[str, Shard], group: dist.ProcessGroup) -> None:
    """Sum the gradients of parameters shared along tp; once a step, before clipping.

    These are heads, groups and experts' maps that more than one process computes with. What a
    process has zeros in place of learns nothing.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in shards and shards[name].zero:
            parameter.grad.zero_()
    sum_common(list(_common(model, shards)), group)


@torch.no_grad()
def sum_common(found: Sequence[tuple[Tensor, Common]], group: dist.ProcessGroup) -> None:
    """Sum in place the gradients of units that several processes along tp have."""
    for dtype in dict.fromkeys(part.dtype for part, _ in found):
        parts = [(part, common) for part, common in found if part.dtype == dtype]
        # A place for each unit: all add up at once, and each process reads its own.
        places = [part.new_zeros(common.units, part.numel()) for part, common in parts]
        for place, (part, common) in zip(places, parts, strict=True):
            place[common.unit] = part.flatten()
        flat = torch.cat([place.flatten() for place in places])
        dist.all_reduce(flat, group=group)
        totals = torch.split(flat, [place.numel() for place in places])
        for total, (part, common) in zip(totals, parts, strict=True):
            part.copy_(total.view(common.units, *part.shape)[common.unit])


def _common(model: nn.Module, shards: Mapping[str, Shard]) -> Iterator[tuple[Tensor, Common]]:
    for name, parameter in model.named_parameters():
        for common in shards[name].common if name in shards else ():
            if parameter.grad is not None:
                start, end = common.range
                yield parameter.grad.narrow(common.dim, start, end - start), common
