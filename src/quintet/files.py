"""Small text files: read with limits, written atomically; directories, locked."""

import io
import json
import os
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EAGAIN, EWOULDBLOCK
from pathlib import Path
from typing import Any, BinaryIO

from quintet.errors import CheckpointError, SaveError, shown

# Settings of a tokenizer with 20,000 added tokens are 4 MB; parsed, they take several times that.
MAX_SETTINGS_BYTES = 8_000_000
# An index of 100,000 tensors is 10 MB, a tokenizer.json of a vocabulary of 256k 35 MB.
MAX_LISTING_BYTES = 128_000_000
# What JSON takes in memory depends on its values, of which two bytes can be one: a file that is as
# large as it may be has to have as many bytes a value on average. Settings have 20 and more.
BYTES_A_VALUE = 16
# Seconds that a save waits for another's: some of those have hundreds of gigabytes to write.
PATIENCE = 600.0


def check_size(path: Path, most: int) -> int:
    """Return a file's size, and refuse one of more than `most` bytes before it is read.

    Raises:
        CheckpointError: it is larger.
        OSError: there is no such file, or it cannot be looked at.
    """
    if (size := path.stat().st_size) > most:
        raise _too_large(path, f"{size:,} bytes is", most)
    return size


def read_limited(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        CheckpointError: the file cannot be read, or is larger.
        FileNotFoundError: there is no such file.
    """
    try:
        size = check_size(path, most)
        with path.open("rb") as file:
            # A pipe or a device has no size; room for what is asked for is made at once.
            raw = file.read((size or most) + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) > most:
        raise _too_large(path, "it has", most)
    return raw


def read_text(path: Path, most: int = MAX_SETTINGS_BYTES) -> str:
    """Read a text of at most `most` bytes from a file, with the line ends of any system.

    Raises:
        CheckpointError: the file cannot be read, is too large, or not UTF-8.
        FileNotFoundError: there is no such file.
    """
    raw = read_limited(path, most)
    try:
        return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not a readable file of UTF-8 text ({error})") from error


def _too_large(path: Path, description: str, most: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: {description} more than the limit of {most:,} bytes; check the path, or fetch "
        "the file again"
    )


def read_json(path: Path, most: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most `most` bytes, and a sixteenth as many values, from a file.

    Raises:
        CheckpointError: the file cannot be read, is too large, not UTF-8, not JSON, or no object.
        FileNotFoundError: there is no such file.
    """
    raw = read_limited(path, most)
    # Each value but the first follows one of these; those within strings count as well.
    if (values := sum(map(raw.count, (b"[", b"{", b",")))) > most // BYTES_A_VALUE:
        raise CheckpointError(
            f"{path}: {values:,} values are more than the limit of {most // BYTES_A_VALUE:,}; "
            "fetch the file again"
        )
    try:
        value = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable as JSON ({error}); fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} has to hold a JSON object, not {type(value).__name__}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        SaveError: the disk is full, the folder is not writable, or `path` is a directory.
    """
    _write({path: io.BytesIO(text.encode())})


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        SaveError: the disk is full, the folder is not writable, or `path` is a directory.
    """
    _write({path: io.BytesIO(content)})


def write_texts(directory: Path, texts: Mapping[str, str]) -> None:
    """Write several text files; all are on disk before the first is renamed into place.

    Raises:
        SaveError: as for one, or another process is saving into the directory.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory):
            _write({directory / name: io.BytesIO(text.encode()) for name, text in texts.items()})
    except SaveError:
        raise
    except (OSError, ValueError) as error:
        where = shown(str(directory))
        raise SaveError(f"could not write into {where}: {_reason(error)}") from error


def copy_file(source: Path, path: Path) -> None:
    """Copy a file atomically.

    Raises:
        SaveError: the disk is full, the folder is not writable, or `path` is a directory.
    """
    with source.open("rb") as content:
        _write({path: content})


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _write(contents: Mapping[Path, BinaryIO]) -> None:
    written: dict[Path, Path] = {}
    path = Path()
    try:
        try:
            for path, content in contents.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                new = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
                # A plain `open`: asking for the umask sets it, for all threads at once.
                with new.open("xb") as file:
                    written[path] = new
                    shutil.copyfileobj(content, file)
                    file.flush()
                    os.fsync(file.fileno())
            for path, new in written.items():
                new.replace(path)
        except BaseException:
            for new in written.values():
                new.unlink(missing_ok=True)
            raise
    # A name with a character that no file can have is no error of the system.
    except (OSError, ValueError) as error:
        raise SaveError(f"could not write {shown(str(path))}: {_reason(error)}") from error


@contextmanager
def locked(directory: Path, patience: float | None = None) -> Iterator[None]:
    """Lock a directory against saves by other processes, waiting for theirs to end.

    The lock is on the directory itself: nothing is left in it, and it ends with its process.

    Args:
        patience: how many seconds to wait, ten minutes if None.

    Raises:
        SaveError: another process is still saving there, and which one.
        OSError: there is no such directory, or no right to look into it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(directory, os.O_RDONLY)
    try:
        _wait_for(handle, directory, PATIENCE if patience is None else patience)
        # While this one waited, another directory may have come into its place.
        while not os.path.samestat(os.fstat(handle), os.stat(directory)):
            os.close(handle)
            handle = os.open(directory, os.O_RDONLY)
            _wait_for(handle, directory, PATIENCE if patience is None else patience)
        try:
            yield
        finally:
            # A process forked meanwhile shares the lock: closing our handle would not end it.
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _wait_for(handle: int, directory: Path, patience: float) -> None:
    import fcntl

    began = time.monotonic()
    warned = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks; two saves at once are then on their own.
            if error.errno not in (EAGAIN, EWOULDBLOCK):
                return
        else:
            return
        waited = time.monotonic() - began
        if waited >= patience:
            raise SaveError(
                f"{_holder(handle)} is saving into {directory}; wait for it, end it, or save into "
                "another directory"
            )
        if waited >= 1 and not warned:
            warned = True
            warnings.warn(
                f"{_holder(handle)} is saving into {directory}; waiting for it", stacklevel=6
            )
        time.sleep(0.02)


def _holder(handle: int) -> str:
    """Return the process that locks a file, from /proc/locks."""
    found = os.fstat(handle)
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, process, place, *_ = line.split()
            if kind == "FLOCK" and place == f"{device}:{found.st_ino}":
                command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                shown = b" ".join(command).decode(errors="replace").strip()
                return f"process {process} ({shown[:80]})"
    return "another process"
