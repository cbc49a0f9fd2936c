"""Saves a sharded model as one ordinary checkpoint, written by the first process.

It asks for one tensor after the other, in the order in which it writes them; the others send their
parts. What each tensor is follows from a model of the same configuration without memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quintet.checkpoint import StackPiece, pieces, save
from quintet.modeling.core import ModelCore
from quintet.modeling.init_on_meta import init_on_meta
from quintet.modeling.key_mapping import check_tied
from quintet.parallel.gathering import Portion, gather, own_part
from quintet.parallel.placement import Shard, place, seated, table_of
from quintet.parallel.together import Together
from quintet.parallel.world import World
from quintet.quantization import Quantized, part_state

Shape = tuple[int, ...]
# What each process has of tensors that are given out by layers.
Stages = list[dict[str, torch.dtype]] | None

END = -1


@dataclass(frozen=True, slots=True)
class _Plain:
    """A plain tensor, or an expert's slice of one.

    Attributes:
        spec: the tensor of the checkpoint, without memory.
        name: of the model's tensor.
        tensor: what this process has of that; without data where it is on other stages.
        piece: which part of it the checkpoint has.
    """

    spec: Tensor
    name: str
    tensor: Tensor
    piece: StackPiece

    def whole(self, shares: "Shares") -> Tensor | None:
        """Gather it on the first process; every process must call this."""
        found = shares.shards_of(self.name, self.piece)
        shard, place = found[shares.world.rank]
        local = None if shard is None else own_part(self.tensor)
        if local is not None and place is not None:
            local = local[place]
        portion = Portion(local, [shard for shard, _ in found], self.tensor.dtype)
        return gather(portion, shares.world)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A tensor of a quantised matrix on disk.

    Attributes:
        spec: the tensor of the checkpoint, without memory; itself if it says nothing of weights.
        file: its name there.
        weight: the name of the matrix, or the stack it is in.
        module: what holds it.
        parts: what this process has of the parts of that, as above.
        piece: which matrix of a stack it is of.
        needed: the parts that it is made of.
        dtype: of the model.
    """

    spec: Tensor
    file: str
    weight: str
    module: Quantized
    parts: Mapping[str, Tensor]
    piece: StackPiece
    needed: tuple[str, ...]
    dtype: torch.dtype

    def whole(self, shares: "Shares") -> Tensor | None:
        """Gather it on the first process; every process must call this."""
        leaf = self.weight.rpartition(".")[2]
        weight_format, specs = self.module.formats[leaf], _empty(self.module, leaf, self.piece)
        found = shares.shards_of(self.weight, self.piece)
        local: Mapping[str, Tensor] = self.parts
        if self.piece.place is not None:
            own_place, rows = found[shares.world.rank][1], self.piece.place[1]
            number = rows.start // self.piece.shape[0]
            local = (
                {} if own_place is None else self.module.view(leaf, local, (own_place[0], number))
            )
        cut = [None if shard is None else weight_format.shards(shard) for shard, _ in found]
        parts = dict(specs)
        for suffix in self.needed:
            own = [None if one is None else one[suffix] for one in cut]
            whole = gather(Portion(local.get(suffix), own, specs[suffix].dtype), shares.world)
            parts[suffix] = specs[suffix] if whole is None else whole
        if shares.world.rank != 0:
            return None
        return weight_format.pack(self.piece.name, parts, self.piece.shape, self.dtype)[self.file]


@dataclass(frozen=True, slots=True)
class Shares:
    """The share of each tensor that each process holds."""

    world: World
    shards: Sequence[Mapping[str, Shard]]

    def shards_of(
        self, name: str, piece: StackPiece
    ) -> list[tuple[Shard | None, tuple[int, slice] | None]]:
        """Return each process's shard of a piece and its place; None for none."""
        place, found = piece.place, [shards.get(name) for shards in self.shards]
        if place is None:
            return [(shard, None) for shard in found]
        pieces = [None if shard is None else shard.piece(*place) for shard in found]
        return [one or (None, None) for one in pieces]


def _entries(
    model: ModelCore, shapes: Mapping[str, Shape], stages: Stages
) -> Iterator[tuple[str, _Plain | _Packed]]:
    """Yield the checkpoint's tensors by name, in the order of a one-process save.

    Raises:
        InputError: tied weights are two.
    """
    tied = model.tied_names()
    plain, parted = part_state(model, _state(model, shapes, stages), tied)
    check_tied(plain, tied)
    for name, tensor in plain.items():
        if name not in tied:
            for piece in pieces(name, shapes[name], model.expert_stacks):
                spec = torch.empty(piece.shape, dtype=tensor.dtype, device="meta")
                yield piece.name, _Plain(spec, name, tensor, piece)
    for weight, (module, leaf, parts) in parted.items():
        whole = [StackPiece(weight, shapes[weight])]
        stacked = pieces(weight, shapes[weight], model.expert_stacks)
        for piece in stacked if module.matrices[leaf][1] else whole:
            empty = _empty(module, leaf, piece)
            packed = module.formats[leaf].pack(piece.name, empty, piece.shape, model.dtype)
            for file, spec in packed.items():
                same = tuple(suffix for suffix, one in empty.items() if one is spec)
                # What is made of others is made of scales, or says nothing of weights.
                needed = same or tuple(suffix for suffix in empty if suffix and spec.is_meta)
                yield file, _Packed(spec, file, weight, module, parts, piece, needed, model.dtype)


def _of_stages(model: ModelCore, world: World) -> Stages:
    """Return names and dtypes per process under pipeline parallelism, else None."""
    if world.degrees.pp == 1:
        return None
    dtypes: list[Any] = [None] * world.degrees.size
    dist.all_gather_object(dtypes, {name: t.dtype for name, t in model.state_dict().items()})
    return dtypes


def _state(model: ModelCore, names: Iterable[str], stages: Stages) -> dict[str, Tensor]:
    """Return the tensors of the whole model in order; other stages' have no data."""
    own = model.state_dict()
    if stages is None:
        return own
    dtypes = {name: dtype for one in stages for name, dtype in one.items()}
    # Parts of matrices in fewer bits are found by the names of these, in whichever order.
    order = [name for name in names if name in dtypes]
    return {
        name: own[name] if name in own else torch.empty(0, dtype=dtypes[name], device="meta")
        for name in dict.fromkeys([*order, *dtypes])
    }


def _empty(module: Quantized, leaf: str, piece: StackPiece) -> dict[str, Tensor]:
    specs = module.formats[leaf].parts(piece.shape)
    return {s: torch.empty(o.shape, dtype=o.dtype, device="meta") for s, o in specs.items()}


def _shares(model: ModelCore, world: World, stages: Stages) -> tuple[Shares, dict[str, Shape]]:
    """Return each process's share of each tensor, and the whole shapes."""
    whole = init_on_meta(type(model), model.config)
    table, state = seated(table_of(whole), world.seats, world.degrees.ep), whole.state_dict()
    # What several share is in the table by the first of its names, and saved by that.
    shapes = {n: tuple(t.shape) for n, t in state.items() if n in table.parameters}
    places = [world.degrees.place(rank) for rank in range(world.degrees.size)]
    shards = [place(shapes, table, place_of_rank) for place_of_rank in places]
    if stages is not None:
        # By modules: what is quantised has other names than when it was given out.
        modules = [{name.rpartition(".")[0] for name in names} for names in stages]
        shards = [
            {name: shard for name, shard in own.items() if name.rpartition(".")[0] in paths}
            for own, paths in zip(shards, modules, strict=True)
        ]
    return Shares(world, shards), shapes


def write_together(
    model: ModelCore,
    world: World,
    directory: Path,
    *,
    max_shard_size: int | str,
    variant: str | None,
    texts: Mapping[str, str],
    writes: bool,
) -> None:
    """Save a sharded model; every process must call this.

    Args:
        writes: whether the first process is to write; the others follow it.

    Raises:
        RankFailedError: writing failed, or a process could not take part in it.
    """
    with Together(world, "before it saved"):
        stages = _of_stages(model, world)
        shares, shapes = _shares(model, world, stages)
        entries = dict(_entries(model, shapes, stages))
    with Together(world, "while it saved"):
        if world.rank != 0:
            _follow(list(entries.values()), shares)
            return
        numbers = {name: number for number, name in enumerate(entries)}

        def data(name: str) -> Tensor:
            _broadcast_index(numbers[name], world)
            tensor = entries[name].whole(shares)
            assert tensor is not None, "the first process has it"
            return tensor

        try:
            if writes:
                save(
                    directory,
                    {name: entry.spec for name, entry in entries.items()},
                    max_shard_size=max_shard_size,
                    variant=variant,
                    text_files=texts,
                    data=data,
                )
        finally:
            _broadcast_index(END, world)


def _follow(entries: list[_Plain | _Packed], shares: Shares) -> None:
    """Send the shares that the first process requests, until it is done."""
    while (number := _broadcast_index(END, shares.world)) != END:
        entries[number].whole(shares)


def _broadcast_index(number: int, world: World) -> int:
    """Return the number broadcast by the first process."""
    sent = torch.tensor([number], device=world.device, dtype=torch.long)
    dist.broadcast(sent, 0)
    return int(sent)
