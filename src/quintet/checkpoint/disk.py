"""File operations of a save, each in one place so that tests can make it fail."""

import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from quintet.checkpoint.layout import UNDO


def make(directory: Path) -> None:
    """Create a new directory."""
    os.mkdir(directory)


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a new file and flush it to disk."""
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def move(source: Path, target: Path) -> None:
    """Rename a file atomically, replacing the target."""
    os.replace(source, target)


def same_file_as(source: Path, target: Path) -> None:
    """Hard-link a file, if the file system can."""
    os.link(source, target)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def discard(directory: Path) -> None:
    """Remove a save's temporary directory as far as possible."""
    with suppress(OSError):
        # First: without its neighbours it would say that the save was interrupted.
        remove(directory / UNDO)
    shutil.rmtree(directory, ignore_errors=True)


def sync(directory: Path) -> None:
    """Flush a directory's entries to disk."""
    if sys.platform == "win32":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
