"""Sharding of quantised matrices: whether it is possible, and the error if not."""

from collections.abc import Mapping

from quintet.errors import InputError
from quintet.parallel.placement import Place, Shard, shard_of
from quintet.parallel.world import Degrees
from quintet.quantization.apply import Slot
from quintet.sharding import Sharding


def check_divided(
    slots: Mapping[str, Slot], shards: Mapping[str, Shard], table: Sharding, degrees: Degrees
) -> None:
    """Refuse to cut the blocks of a format.

    Args:
        slots: where matrices in fewer bits go, by their names.
        shards: what this process has of each tensor.
        table: how they are cut.
        degrees: among how many processes.

    Raises:
        InputError: a matrix cannot be cut so; it names the degrees at which it can.
    """
    for name, slot in slots.items():
        if _fits(slot, shards[name]):
            continue
        shape, t = shards[name].shape, degrees.tp
        good = [n for n in range(1, 2 * t + 1) if _all_fit(name, slot, shape, table, n, degrees.ep)]
        raise InputError(
            f"{name} {list(shape)} is held in {slot.module.formats[slot.name].name}, whose blocks "
            f"tp={t} would cut; tp may be {', '.join(map(str, good))}, or quantize='none' loads it "
            "as plain numbers, which can be cut anywhere"
        )


def _all_fit(
    name: str, slot: Slot, shape: tuple[int, ...], table: Sharding, count: int, ep: int
) -> bool:
    etp = max(count // ep, 1)
    for index in range(count):
        process = Place(tp=(index, count), ep=(0, ep), etp=(index % etp, etp))
        try:
            shard = shard_of(name, shape, table.parameters[name], process)
        except InputError:
            return False
        if not _fits(slot, shard):
            return False
    return True


def _fits(slot: Slot, shard: Shard) -> bool:
    """Return whether every shard of a matrix can be cut from the whole."""
    weight_format, (_, stack) = slot.module.formats[slot.name], slot.module.matrices[slot.name]
    if not stack:
        return weight_format.shards(shard) is not None
    rows = shard.shape[1] // stack[1]
    first = shard.ranges[0][0][0] if 0 in shard.ranges else 0
    found = [shard.piece(first, slice(i * rows, (i + 1) * rows)) for i in range(stack[1])]
    return all(one is None or weight_format.shards(one[0]) is not None for one in found)
