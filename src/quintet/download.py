"""Downloads a hub repository into the hub cache, and checks that files are complete."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path

from quintet.errors import (
    CheckpointError,
    InputError,
    ModelNotFoundError,
    OfflineError,
    SaveError,
    shown,
)

_REVISION = re.compile(r"\w[\w.+@#=/-]{0,249}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What a process that was killed leaves: nobody resumes a file of this name.
_PARTIAL = re.compile(r"([0-9a-f]+)\.[0-9a-f]{8}\.incomplete")


class _ChangedError(Exception):
    """A partial download belongs to an older version of the file."""


def download(
    name: str,
    patterns: Sequence[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
    force: bool = False,
) -> Path:
    """Return the snapshot with the files of `patterns`, downloading those that are missing.

    With `force` all are fetched, whatever the cache has.

    Large files are held against the SHA-256 by which the hub knows them, once they have come: a
    connection that broke off goes on at the byte it had come to, whatever is there by then. One
    that is wrong is removed and fetched once more. Two processes take turns file by file.

    Raises:
        ModelNotFoundError: no such repository, revision, or no access to it.
        InputError: the revision cannot be one.
        OfflineError: not in the cache, and the network is off or unreachable.
        CheckpointError: a file came twice with another content than the hub says it has.
        SaveError: the cache cannot be written.
    """
    # Imported here: huggingface_hub takes a third of a second, and a local path needs none of it.
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)
    folder = cache / repo_folder_name(repo_id=name, repo_type="model")
    where = (revision, cache_dir, token, local_files_only, force)
    for attempt in range(2):
        known = set() if force else set(_blobs(folder))
        try:
            root = _fetch(name, patterns, *where)
        except _ChangedError as error:
            if attempt:
                raise OfflineError(f"{name!r} could not be fetched: {error}; try again") from error
            continue
        wrong = [blob for blob in _blobs(folder) if blob not in known and not _is_right(blob)]
        if not wrong:
            _remove_partial(folder, cache / ".locks" / folder.name)
            return root
        names = _remove(wrong, folder)
    raise CheckpointError(
        f"{name!r}: {', '.join(names)} came twice with a SHA-256 that is not the one the hub has "
        "for it, and is not kept; something between here and the hub changes files"
    )


def _blobs(folder: Path) -> Iterator[Path]:
    """Yield the files of a repository whose names are their SHA-256."""
    return (path for path in folder.glob("blobs/*") if _SHA256.fullmatch(path.name))


def _is_right(blob: Path) -> bool:
    try:
        with blob.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
    except FileNotFoundError:
        return False  # another process found it wrong, too


def _remove(blobs: Sequence[Path], folder: Path) -> list[str]:
    """Delete files and the links to them; return their names."""
    for blob in blobs:
        blob.unlink(missing_ok=True)
    links = [path for path in folder.glob("snapshots/**/*") if path.is_symlink()]
    dangling = [path for path in links if not path.exists()]
    for path in dangling:
        path.unlink(missing_ok=True)
    return sorted({path.name for path in dangling})


def cause_of(error: BaseException) -> str:
    """Return the cause of a library's error in one line, without class names."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "it did not answer"


def _remove_partial(folder: Path, locks: Path) -> None:
    """Delete interrupted downloads; a running one holds its file's lock."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    for path in folder.glob("blobs/*.incomplete"):
        if match := _PARTIAL.fullmatch(path.name):
            with suppress(OSError), WeakFileLock(locks / f"{match[1]}.lock", timeout=0.05):
                path.unlink(missing_ok=True)


def _fetch(
    name: str,
    patterns: Sequence[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
    force: bool = False,
) -> Path:
    from huggingface_hub import constants, snapshot_download

    check_revision(revision)
    offline = local_files_only or constants.is_offline_mode()
    with _named_errors(name, revision, cache_dir, offline):
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=Path(cache_dir) if cache_dir is not None else None,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
                force_download=force,
            )
        )


def list_files(name: str, revision: str | None, token: str | bool | None) -> list[str]:
    """Return the names of a repository's files on the hub, as POSIX paths.

    Raises:
        ModelNotFoundError: no such repository, revision, or no access to it.
        InputError: the revision cannot be one.
        OfflineError: the network is off or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    check_revision(revision)
    with _named_errors(name, revision, None, constants.is_offline_mode()):
        return list(HfApi(token=token).list_repo_files(name, revision=revision))


def snapshot_of(
    name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> Path | None:
    """Return a repository's folder in the hub cache, or None.

    Raises:
        InputError: the revision cannot be one.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    check_revision(revision)
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)
    folder = cache / repo_folder_name(repo_id=name, repo_type="model")
    commit = revision or "main"
    with suppress(OSError, ValueError):
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    root = folder / "snapshots" / commit
    return root if root.is_dir() and root.resolve().is_relative_to(folder.resolve()) else None


def check_revision(revision: object) -> None:
    """Check that a revision can be a branch, a tag or a commit: the cache has a file of its name.

    Raises:
        InputError: it cannot, as it leads out of the cache, say.
    """
    if revision is None:
        return
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision:
        raise InputError(
            f"revision={shown(revision)} has to be a branch, a tag or a commit, such as 'main'"
        )


@contextmanager
def _named_errors(
    name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, offline: bool
) -> Iterator[None]:
    """Turn errors of the hub client into errors that name a remedy."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"no directory {name!r}, and it is not a valid hub id: {error}"
        ) from error
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{name!r} is gated: accept its terms on the hub, then run `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"no directory {name!r} here and no such repository on the hub; check the spelling, "
            "or run `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{name!r} has no revision {revision!r}") from error
    # Whatever else: the library below huggingface_hub, and so what it raises when a connection
    # breaks or something answers that is not the hub, differs between its versions.
    except Exception as error:
        # It asked for the rest of a file that is no longer that long.
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 416:
            raise _ChangedError(f"it changed while it was fetched ({error})") from error
        if isinstance(error, OSError) and (error.filename is not None or error.errno == ENOSPC):
            raise SaveError(
                f"the hub cache {cache_dir or constants.HF_HUB_CACHE} cannot be written: "
                f"{error.strerror}; set HF_HOME, or cache_dir, to a folder with room that you may "
                "write to"
            ) from error
        reason = (
            "offline mode is set (HF_HUB_OFFLINE or local_files_only)"
            if offline
            else f"the hub could not be reached at {constants.ENDPOINT}: {cause_of(error)}"
        )
        raise OfflineError(
            f"{name!r}{at} is neither a directory here nor in the hub cache "
            f"({cache_dir or constants.HF_HUB_CACHE}), and {reason}; "
            "connect and download it once, or name a local directory"
        ) from error
