"""The calls of a save that can fail, each in one place."""

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from quintet.checkpoint.layout import UNDO


def make(directory: Path) -> None:
    """Make a directory that is not there yet."""
    os.mkdir(directory)


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a new file and return when the disk has it."""
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def move(source: Path, target: Path) -> None:
    """Give a file another name in one step; what had that name is gone."""
    os.replace(source, target)


def same_file_as(source: Path, target: Path) -> None:
    """Give a file a second name; not every file system can."""
    os.link(source, target)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def discard(directory: Path) -> None:
    """Remove the temporary directory of a save as far as possible; what stays is harmless."""
    with suppress(OSError):
        # First: without its neighbours it would say that the save was interrupted.
        remove(directory / UNDO)
    shutil.rmtree(directory, ignore_errors=True)


def sync(directory: Path) -> None:
    """Return when the disk has the names of a directory as they are now."""
    if sys.platform == "win32":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
