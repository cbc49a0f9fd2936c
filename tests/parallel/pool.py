"""Processes that are kept: cases are functions of a module, and run in all of them at once.

They are forked from one that has imported everything, which takes milliseconds, and are made anew
where one failed or took too long.
"""

import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from parallel.server import server
from quintet.parallel.world import World
from waiting import PATIENCE

__all__ = ["Pool", "RankError"]

# Of a collective: shorter than a case, so that it is told where the processes parted.
TIMEOUT = timedelta(seconds=PATIENCE / 2)


class RankError(AssertionError):
    """A case failed in a process."""


def _serve(rank: int, size: int, meeting: str, orders: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Groups are kept with the processes: to make one takes longer than most cases, and each has
    # threads that look for messages many times a second as long as the process lives.
    World.of = cache(World.of)  # type: ignore[method-assign]
    store = dist.FileStore(meeting, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    while True:
        try:
            case, args = orders.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            orders.send((True, case(*args)))
        except BaseException as error:
            orders.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
            break


@dataclass
class Pool:
    """`size` processes that wait for cases."""

    size: int
    workers: list[tuple[BaseProcess, Connection]] = field(default_factory=list)

    def run(self, case: Callable[..., Any], *args: Any, seconds: float = PATIENCE) -> list[Any]:
        """Run a case in all processes, and return what each returned.

        A case finds its rank by `torch.distributed.get_rank()`.

        Raises:
            RankError: it failed in one of them, or did not end in time.
        """
        if not self.workers:
            self._start()
        try:
            for _, orders in self.workers:
                orders.send((case, args))
            return self._answers(seconds)
        except BaseException:
            self.close()
            raise

    def _answers(self, seconds: float) -> list[Any]:
        until = monotonic() + seconds
        left = {orders: rank for rank, (_, orders) in enumerate(self.workers)}
        found: dict[int, Any] = {}
        failed: list[str] = []
        while left:
            # Where one failed, the others wait for it in vain: they get a moment to say so.
            ready = wait(list(left), max(min(until - monotonic(), 2.0 if failed else seconds), 0))
            if not ready:
                break
            for orders in ready:
                rank = left.pop(orders)  # type: ignore[arg-type]
                try:
                    good, value = orders.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, value = False, "ended"
                if good:
                    found[rank] = value
                else:
                    failed.append(f"rank {rank}: {value}")
        if failed:
            raise RankError("\n".join(failed))
        if left:
            raise RankError(f"ranks {sorted(left.values())} did not end within {seconds} s")
        return [found[rank] for rank in range(self.size)]

    def _start(self) -> None:
        context = server()
        meeting = str(Path(tempfile.mkdtemp()) / "meeting")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, meeting, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def close(self) -> None:
        """End the processes."""
        for process, orders in self.workers:
            with suppress(OSError):
                orders.close()
            process.kill()
        for process, _ in self.workers:
            process.join(10)
        self.workers.clear()
