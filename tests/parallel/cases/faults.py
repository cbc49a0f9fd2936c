"""Processes that add up numbers, of which one does something else."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from quintet.parallel.faults import collective
from quintet.parallel.launch import join

STEPS = 200
# Nobody waits as long for it.
HOURS = 3600.0


def happens(what: str, victim: int, where: Path) -> None:
    """Let something happen to one of the processes, after a while."""
    torch.set_num_threads(1)
    world = join()
    for step in range(STEPS):
        x = torch.ones(4)
        if world.rank == victim and step == 3:
            (where / "happened").write_text(str(time.monotonic()))
            if _happens(what):
                continue
        with collective():
            dist.all_reduce(x, group=world.groups["tp"])
    print(f"ended {int(x[0])}")


def _happens(what: str) -> bool:
    if what == "raises":
        raise ValueError("no such number")
    if what == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "is told to end":
        os.kill(os.getpid(), signal.SIGTERM)
    if what == "is interrupted":
        raise KeyboardInterrupt
    if what == "leaves":
        sys.exit(0)
    if what == "loops":
        time.sleep(HOURS)
    if what == "calls another":
        dist.barrier()
        return True
    return False


def waits_in_vain(where: Path) -> None:
    """Let rank 0 wait for 2, which is busy, while 1 fails."""
    world = join()
    pair = dist.new_group([0, 2])
    if world.rank == 0:
        dist.all_reduce(torch.ones(1), group=pair)
    if world.rank == 1:
        (where / "happened").write_text(str(time.monotonic()))
        raise ValueError("no such number")
    time.sleep(HOURS)


def joins() -> None:
    """Join, and say who is there."""
    world = join()
    print(f"{world.rank} of {world.degrees.size} on {world.device}")


def uses_its_own_group() -> None:
    """Join where the script made a group by itself."""
    dist.init_process_group("gloo")
    world = join()
    assert dist.get_world_size() == world.degrees.size
    print("joined")
