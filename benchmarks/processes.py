"""Setups of one process or several, which are all there at once and work in turns."""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from quintet.configuration import PreTrainedConfig
from quintet.measurement.geometries import Geometry, geometry

__all__ = ["Running", "Seat", "config_of", "ratio", "running"]


@dataclass(frozen=True)
class Seat:
    """Where one process of a setup is.

    Attributes:
        setup: its name.
        rank: which process this is.
        size: of how many.
        threads: that each has.
        shared_buffer: a path that is all of theirs.
        orders: where work comes from, and results go.
    """

    setup: str
    rank: int
    size: int
    threads: int
    shared_buffer: str
    orders: Connection

    def built(self) -> None:
        """Say that what takes memory while it is made is made, and wait until all are."""
        self.orders.send("built")
        self.orders.recv()

    def join(self) -> None:
        """Make a group of the setup's processes."""
        store = dist.FileStore(self.shared_buffer, self.size)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)

    def work(self) -> Iterator[Any]:
        """Yield what is to be done, until there is no more."""
        self.orders.send("ready")
        while True:
            try:
                yield self.orders.recv()
            except EOFError:
                return


Serve = Callable[[Seat, PreTrainedConfig], None]


@dataclass(frozen=True)
class Running:
    """Setups that run, each with its processes."""

    orders: Mapping[str, Sequence[Connection]]

    def in_turns(self, work: object, rounds: int) -> dict[str, list[list[Any]]]:
        """Return of each setup and round what its processes answer; a first round warms up."""
        found: dict[str, list[list[Any]]] = {setup: [] for setup in self.orders}
        for number in range(rounds + 1):
            for setup, members in self.orders.items():
                for orders in members:
                    orders.send(work)
                answers = [orders.recv() for orders in members]
                if number:
                    found[setup].append(answers)
        return found


@contextmanager
def running(
    setups: Mapping[str, tuple[int, int]], serve: Serve, config: PreTrainedConfig
) -> Iterator[Running]:
    """Start setups, by their names so many processes of so many threads, and end them behind."""
    context = get_context("spawn")
    processes: list[Any] = []
    connections: dict[str, list[Connection]] = {}
    try:
        for setup, (size, threads) in setups.items():
            shared_buffer = str(Path(tempfile.mkdtemp()) / "shared_buffer")
            connections[setup] = []
            for rank in range(size):
                ours, theirs = context.Pipe()
                seat = Seat(setup, rank, size, threads, shared_buffer, theirs)
                process = context.Process(target=_run, args=(serve, seat, config), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                connections[setup].append(ours)
                # One after the other, as each has a whole model for a moment.
                ours.recv()
        every = [orders for members in connections.values() for orders in members]
        for orders in every:
            orders.send(None)
        for orders in every:
            orders.recv()
        yield Running(connections)
    finally:
        for members in connections.values():
            for orders in members:
                orders.close()
        for process in processes:
            process.kill()


def _run(serve: Serve, seat: Seat, config: PreTrainedConfig) -> None:
    torch.set_num_threads(seat.threads)
    serve(seat, config)


def config_of(name: str, **cuts: int | None) -> PreTrainedConfig:
    """Return the config of a geometry, some of its numbers cut to others."""
    shape = geometry(name)
    given = {key: value for key, value in cuts.items() if value is not None}
    return Geometry(shape.model_type, {**shape.values, **given}).config()


def ratio(base: Sequence[float], own: Sequence[float]) -> float:
    """Return how many times as fast as `base` the rounds were, in their median."""
    return statistics.median(a / b for a, b in zip(base, own, strict=True))
