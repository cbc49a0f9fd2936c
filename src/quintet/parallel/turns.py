"""Work that one process of a machine does for all, such as downloads."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from quintet.errors import DistributedError
from quintet.parallel.faults import watch

log = logging.getLogger("quintet.parallel")
T = TypeVar("T")

# Seconds: between two looks, until it is said who is waited for, and until that is given up.
LOOK = 0.05
NOTICE = 5.0
PATIENCE = 12 * 3600.0


def in_turn(work: Callable[[], T], doing: str) -> T:
    """Do something in the first process of this machine, and then in the others.

    They wait at the store, not in a collective: fetching a model takes longer than those may. Where
    no launcher was joined, each does it at once.

    Args:
        work: finds done, in the others, what the first did.
        doing: it is, for those who look why nothing happens.

    Raises:
        DistributedError: the first failed, or is not done after twelve hours.
    """
    watching = watch()
    if watching is None:
        return work()
    host = watching.who[watching.rank].host
    first = min(rank for rank, process in watching.who.items() if process.host == host)
    # All processes make the same calls: those of one turn have the same number.
    turn = f"turn/{first}/{watching.store.add(f'turns/{watching.rank}', 1)}"
    if watching.rank != first:
        _wait(turn, first, doing)
        return work()
    word = "failed"
    try:
        result = work()
        word = "done"
    finally:
        watching.store.set(turn, word)
    return result


def _wait(turn: str, first: int, doing: str) -> None:
    watching = watch()
    assert watching is not None
    began, warned = time.monotonic(), False
    while not watching.store.check([turn]):
        waited = time.monotonic() - began
        if waited > NOTICE and not warned:
            log.warning("rank %d waits for rank %d, which is %s", watching.rank, first, doing)
            warned = True
        if waited > PATIENCE:
            raise DistributedError(f"rank {first} is {doing} for {waited:.0f} s; start all anew")
        time.sleep(LOOK)
    if watching.store.get(turn) == b"failed":
        raise DistributedError(f"rank {first} of this machine failed {doing}")
