"""Processes as a launcher starts them: forks of one that has imported everything."""

import atexit
import os
import random
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from parallel.server import server
from waiting import PATIENCE

__all__ = ["Ended", "free_port", "launch"]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: with which code, when on the clock of all, and what it wrote."""

    code: int
    at: float
    out: str
    err: str


def free_port() -> int:
    """Return a port that nobody has, and that nobody who asks for any port is given meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def launch(
    size: int,
    case: Callable[..., Any],
    *args: Any,
    where: Path,
    environment: Mapping[str, str] | None = None,
    of_rank: Mapping[int, Mapping[str, str]] | None = None,
    ends_others: bool = False,
    seconds: float = PATIENCE,
) -> list[Ended]:
    """Run a case in processes as torchrun starts them, and return how each ended.

    Args:
        of_rank: what the environment of some is besides.
        ends_others: whether all are told to end, as by torchrun, where one failed.
    """
    context = server()
    port = free_port()
    processes = []
    for rank in range(size):
        told = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(environment or {}),
            **(of_rank or {}).get(rank, {}),
        }
        process = context.Process(target=_program, args=(case, args, told, where, rank))
        process.start()
        processes.append(process)
    ends: dict[int, float] = {}
    until = time.monotonic() + seconds
    left = {process.sentinel: rank for rank, process in enumerate(processes)}
    while left and (ready := wait(list(left), max(until - time.monotonic(), 0))):
        for sentinel in ready:
            rank = left.pop(sentinel)  # type: ignore[arg-type]
            ends[rank] = time.monotonic()
            processes[rank].join()
            if ends_others and processes[rank].exitcode:
                for process in processes:
                    process.terminate()
    for process in processes:
        process.kill()
        process.join()
    texts = [_texts(where, rank) for rank in range(size)]
    assert not left, f"ranks {sorted(left.values())} did not end within {seconds} s: {texts}"
    return [
        Ended(process.exitcode or 0, ends[rank], *texts[rank])
        for rank, process in enumerate(processes)
    ]


def _texts(where: Path, rank: int) -> list[str]:
    return [(where / f"{rank}.{end}").read_text(encoding="utf-8") for end in ("out", "err")]


def _program(
    case: Callable[..., Any], args: Any, told: Mapping[str, str], where: Path, rank: int
) -> None:
    for number, end in enumerate(("out", "err"), 1):
        os.dup2(os.open(where / f"{rank}.{end}", os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    (where / f"{rank}.pid").write_text(str(os.getpid()), encoding="utf-8")
    sys.excepthook = sys.__excepthook__
    os.environ.update(told)
    warnings.simplefilter("error")
    code = 1
    # What the interpreter does around a script, as far as it goes here.
    try:
        case(*args)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
