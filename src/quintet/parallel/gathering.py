"""Gathers whole tensors on the first process, one at a time."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quintet.parallel.placement import Shard
from quintet.parallel.world import DENSE, World


@dataclass(frozen=True, slots=True)
class Portion:
    """A tensor of which each process has a part.

    Attributes:
        part: what this process has; None for nothing.
        shards: what each process has, by its rank; None for nothing.
        dtype: of the tensor.
    """

    part: Tensor | None
    shards: Sequence[Shard | None]
    dtype: torch.dtype

    @property
    def owners(self) -> dict[int, Shard]:
        """The processes whose parts make the whole: of those that have the same, the first."""
        found: dict[tuple[object, ...], tuple[int, Shard]] = {}
        for rank, shard in enumerate(self.shards):
            if shard is not None and not shard.zero:
                found.setdefault(tuple(sorted(shard.ranges.items())), (rank, shard))
        return dict(found.values())


def gather(portion: Portion, world: World) -> Tensor | None:
    """Return a whole tensor in the first process, and None in the others.

    Every process has to call it, for the same tensor. What is on its way are the parts of one.
    """
    owners = portion.owners
    if world.rank != 0:
        if world.rank in owners and owners[world.rank].numel:
            assert portion.part is not None
            dist.send(_bytes(portion.part.to(world.device)), dst=0)
        return None
    if list(owners) == [0] and owners[0].whole:
        return portion.part
    shape = next(shard.shape for shard in portion.shards if shard is not None)
    whole = torch.empty(shape, dtype=portion.dtype, device=world.device)
    for rank, shard in owners.items():
        if rank == 0:
            assert portion.part is not None
            shard.put(whole, portion.part)
        elif shard.numel:
            part = torch.empty(shard.local_shape, dtype=portion.dtype, device=world.device)
            dist.recv(_bytes(part), src=rank)
            shard.put(whole, part)
    return whole


def to_first(own: Iterable[tuple[str, Tensor]], world: World) -> Iterator[tuple[str, Tensor]]:
    """Yield named tensors, and in the first process behind them those that other stages have.

    Every process reads it to its end. One tensor of another stage is on its way at a time.
    """
    coordinates = world.coordinates
    sends = coordinates["pp"] > 0 and not any(coordinates[axis] for axis in DENSE if axis != "pp")
    for name, tensor in own:
        if sends:
            _send_spec(
                {"name": name, "dtype": _name(tensor.dtype), "shape": list(tensor.shape)}, world
            )
            if tensor.numel():
                dist.send(_bytes(tensor.to(world.device)), dst=0)
        yield name, tensor
    if sends:
        _send_spec({}, world)
    if world.rank == 0:
        for stage in dist.get_process_group_ranks(world.groups["pp"])[1:]:
            while spec := _receive_spec(stage, world):
                dtype: torch.dtype = getattr(torch, spec["dtype"])
                tensor = torch.empty(spec["shape"], dtype=dtype, device=world.device)
                if tensor.numel():
                    flat = _bytes(tensor)
                    dist.recv(flat, src=stage)
                    tensor = flat.view(dtype).view(spec["shape"])
                yield spec["name"], tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _send_spec(value: dict[str, Any], world: World) -> None:
    """Send a tensor's description to the first process."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    dist.send(torch.tensor([len(text)], dtype=torch.long, device=world.device), dst=0)
    dist.send(text.to(world.device), dst=0)


def _receive_spec(rank: int, world: World) -> dict[str, Any]:
    """Receive the description of a tensor from a process."""
    size = torch.zeros(1, dtype=torch.long, device=world.device)
    dist.recv(size, src=rank)
    text = torch.empty(int(size), dtype=torch.uint8, device=world.device)
    dist.recv(text, src=rank)
    spec: dict[str, Any] = json.loads(bytes(text.tolist()))
    return spec


def own_part(tensor: Tensor) -> Tensor:
    """Return a process's tensor before batches were divided: FSDP's slices, joined.

    Where FSDP divided it, all processes that share it have to call this.
    """
    from torch.distributed.tensor import DTensor

    plain = tensor.detach()
    return plain.full_tensor() if isinstance(plain, DTensor) else plain


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: backends know few types of numbers."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
