"""Small text files, read with limits and written whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from quintet.errors import CheckpointError, SaveError

__all__ = ["read_json", "replace_file", "write_text"]

# A tokenizer.json of a 256k vocabulary is about 35 MB; nothing honest is larger.
MAX_JSON_BYTES = 256 * 1024 * 1024


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is too large, not UTF-8, not JSON, or not an object.
        FileNotFoundError: there is no such file.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {size} bytes is more than the limit of {MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable as JSON ({error}); fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has to hold a JSON object, not {type(value).__name__}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part.

    Raises:
        SaveError: the disk is full, the folder is not writable, or `path` is a directory.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            replace_file(Path(name), path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SaveError(f"could not write {path}: {error.strerror or error}") from error


def replace_file(new: Path, path: Path) -> None:
    """Move a finished temporary file to its name, with the rights a plain `open` would give."""
    mask = os.umask(0)
    os.umask(mask)
    new.chmod(0o666 & ~mask)
    new.replace(path)
