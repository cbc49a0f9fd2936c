"""Cases of planned memory; each process compares it with the bytes that it has."""

from dataclasses import asdict
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from parallel.cases.generate import chooses, models
from parallel.cases.tensor import family, world
from quintet.cli.share import share_of
from quintet.generation.following import follow, leading
from quintet.parallel.apply import shard_model
from quintet.parallel.division import DistributedConfig, degrees_for
from quintet.parallel.fsdp import divide
from quintet.planning.devices import device
from quintet.planning.inference import Workload, footprint
from quintet.planning.plans import described
from quintet.planning.training import Training, training_footprint
from quintet.planning.world import Split
from quintet.serving import Limits
from quintet.serving.memory import cost_of, room_of


def bytes_of_a_shard(name: str, changes: dict[str, Any], degrees: dict[str, int]) -> None:
    """Compare what a process has of a model with what is planned of the largest share."""
    model = family(name).model_of(**changes)
    planned, _ = described(model.config, device("cpu"), dtype=torch.float32)
    most = footprint(planned, Split(**degrees), Workload(8, itemsize=4)).weights
    shard_model(model, world(**degrees))
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    held = sum(t.nbytes for t in tensors.values())
    # The last of the vocabulary's parts is smaller.
    assert 0.95 * most <= held <= 1.001 * most, f"planned {most}, held {held}"


def bytes_of_slices(name: str) -> None:
    """Compare what a process steps of a model in slices with what is planned."""
    model = family(name).model_of()
    planned, _ = described(model.config, device("cpu"))
    work = Training(8, rows=2, itemsize=4)
    most = training_footprint(planned, Split(fsdp=2), work).weights
    layers = model.base_model.get_submodule("layers")
    divide(model, layers, world(fsdp=2), low=False)
    own = {id(p): p.to_local() for p in model.parameters() if isinstance(p, DTensor)}
    held = sum(t.nbytes for t in own.values())
    # Of an odd number of rows, one process has one more.
    assert 0.95 * most <= held <= 1.05 * most, f"planned {most}, held {held}"


def bytes_of_served(name: str, changes: dict[str, Any], sizes: dict[str, int]) -> None:
    """Compare what is said of a process that serves with what it has: weights, rows, tokens."""
    degrees = degrees_for(family(name).model_of(**changes), DistributedConfig(**sizes), 2)
    _, model = models(name, asdict(degrees), changes)
    work = Workload(16, rows=3, itemsize=4, cache_dtype="float32")
    said = share_of(model.config, sizes, 2, work, torch.float32)
    if not (chooses() or degrees.fsdp > 1):
        return follow(model)
    with leading(model):
        cost = cost_of(model, None)
    room = room_of(model, Limits(rows=3, capacity=16), cost)
    assert 0.95 * said.weights <= room.weights <= 1.001 * said.weights
    assert (cost.row, cost.token) == (said.row, said.token)
    assert room.whole == said.cache
