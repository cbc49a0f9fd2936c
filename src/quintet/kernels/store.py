"""Compiled libraries in the user's cache: complete, private, built by one process.

A library ends with the digest of all before it, which loaders do not read. Loading one that was cut
would end the process with a bus error, and loading somebody else's would run what they wrote.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from quintet.kernels.patience import told

MARK = b"quintet kernels, sha256 of the above:"
SCRATCH = "build-"
# How long another process may take to compile before this one goes on without kernels.
PATIENCE = 120.0
# As many as levels and versions one switches between.
KEPT = 8
SUPERUSER = 0
REMEDY = "set XDG_CACHE_HOME to a folder of your own"


class BuildError(Exception):
    """The reason why there is no library, as `report()` shows it.

    Args:
        text: the reason.
        remedy: what to do about it; None where nothing can be done on this machine.
    """

    def __init__(self, text: str, remedy: str | None = None) -> None:
        super().__init__(text)
        self.remedy = remedy


def cache_folder() -> Path:
    """Return the user's folder of compiled libraries."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "quintet"


def open_folder() -> Path:
    """Return the folder, creating it if needed.

    Raises:
        BuildError: it cannot be written, or another user could have put something there.
    """
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = _own(folder)
        if mode & 0o022:
            folder.chmod(mode & ~0o022)
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be used: {error.strerror}", REMEDY) from error
    return folder


def is_whole(library: Path) -> bool:
    """Return whether a complete library is there.

    Raises:
        BuildError: another user wrote it.
    """
    try:
        if _own(library) & 0o022:
            return False
        data = library.read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BuildError(f"{library} cannot be read: {error.strerror}", REMEDY) from error
    return data.endswith(_seal(data[: -len(_seal(b""))]))


def publish(made: Path, target: Path) -> None:
    """Seal a library and move it into place atomically."""
    with open(made, "r+b") as file:
        seal = _seal(file.read())
        file.write(seal)
        file.flush()
        os.fsync(file.fileno())
    made.chmod(0o700)
    os.replace(made, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder's lock.

    Raises:
        BuildError: another process has held it for `PATIENCE` seconds.
    """
    with open(folder / "build.lock", "a+", encoding="ascii") as file:
        _wait_for(file.fileno(), _named(folder / "build.lock"))
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Make a temporary folder beside the libraries; the caller holds the lock.

    What processes that were killed left behind goes with it, and the libraries used least lately.
    """
    for path in folder.iterdir():
        # Nobody else compiles: the folder is held.
        if path.is_dir() and path.name.startswith((SCRATCH, "tmp")):
            shutil.rmtree(path, ignore_errors=True)
    libraries = sorted(folder.glob("kernels-*.so"), key=lambda path: path.stat().st_mtime)
    for path in libraries[:-KEPT]:
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as made:
        yield Path(made)


def _seal(data: bytes) -> bytes:
    return MARK + hashlib.sha256(data).digest()


def _own(path: Path) -> int:
    """Return the permissions of a path owned by this user or root."""
    found = path.stat()
    if found.st_uid not in (SUPERUSER, os.geteuid()):
        raise BuildError(
            f"{path} belongs to another user (number {found.st_uid}), who could have put any "
            "program there",
            REMEDY,
        )
    return stat.S_IMODE(found.st_mode)


def _named(lock: Path) -> str:
    try:
        holder = lock.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        holder = ""
    return f"process {holder}" if holder.isdigit() else "another process"


def _wait_for(lock: int, holder: str) -> None:
    import fcntl  # there is none outside of POSIX, where there are no kernels either

    deadline = time.monotonic() + PATIENCE
    with told(f"waiting for {holder}, which is compiling the kernels, {PATIENCE:.0f} s at most"):
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"{holder} has been compiling them for more than {PATIENCE:.0f} s",
                        "start again once it is done, or end it",
                    ) from None
                time.sleep(0.05)
            else:
                return
