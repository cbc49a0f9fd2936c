"""Consistent reads without a lock: files that a save changed meanwhile are read again.

A reader of a directory that it may not write to, or that lies on a network, could hold no lock,
and a save of minutes should keep nobody from the old checkpoint.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from quintet.checkpoint.commit import clean_up
from quintet.checkpoint.layout import STAGING, Names
from quintet.checkpoint.reading import half_moved
from quintet.errors import CheckpointError, QuintetError, SaveError
from quintet.files import locked
from quintet.hub import CONFIG_PATTERNS

T = TypeVar("T")
# Seconds in which a reader has to find a moment between two saves.
PATIENCE = 60.0


def read_consistently(
    directory: Path, read: Callable[[], T], *, variant: str | None = None, stem: str = "model"
) -> T:
    """Call `read` until no save interferes, and return its result.

    Between two looks at the directory in which nothing that a save replaces has changed, `read`
    saw one state of it. `Checkpoint.open` refuses those with texts of one save and weights of
    another, and holds on to the files it found.

    Raises:
        CheckpointError: saves followed each other without a pause for a minute.
        QuintetError: what `read` raises where no save is to blame.
    """
    if directory.is_file():
        # One file is of one model, and written whole.
        return read()
    until = time.monotonic() + PATIENCE
    while True:
        recovered = recover(directory)
        named = Names(variant, stem)
        before = _state(directory, named)
        problem: QuintetError | OSError | None = None
        try:
            found = read()
        except (QuintetError, OSError) as error:
            problem = error
        # A save may have begun since, and nothing of it show yet but its note.
        recovered = recover(directory) and recovered
        same = _state(directory, named) == before
        if problem is None and same:
            return found
        if problem is not None and ((same and recovered) or time.monotonic() > until):
            raise problem
        if time.monotonic() > until:
            raise CheckpointError(f"{directory} is saved into all the time; end that, or copy it")
        time.sleep(0.01)


def recover(directory: Path) -> bool:
    """Undo the half-done moves of a dead save; return whether no save is half done now.

    Where that cannot be done, `Checkpoint.open` refuses the directory.
    """
    if any(half_moved(staging) is not None for staging in directory.glob(f"{STAGING}*")):
        try:
            with locked(directory, patience=0):
                clean_up(directory)
        except SaveError:
            return False
        except OSError:
            pass
    return True


def _state(directory: Path, named: Names) -> dict[str, tuple[int, int, int]]:
    wanted = {*CONFIG_PATTERNS, named.single, named.index}
    state = {}
    for path in directory.iterdir():
        if path.name in wanted or named.is_shard(path.name):
            with suppress(OSError):
                found = path.stat()
                state[path.name] = (found.st_ino, found.st_size, found.st_mtime_ns)
    return state
