"""Finds files of llama.cpp and LM Studio by their hub names."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from quintet.gguf import shard_names


def folders_of(repository: str) -> Iterator[tuple[Path, str]]:
    """Yield the folders that may have files of a hub id, each with the prefix of their names."""
    for home in (Path.home() / ".lmstudio/models", Path.home() / ".cache/lm-studio/models"):
        if (home / repository).is_dir():
            yield home / repository, ""
    for cache in _llama_caches():
        if cache.is_dir():
            # Before it used the hub's own cache, llama.cpp put the repository into the name.
            yield cache, f"{repository.replace('/', '_')}_"


def files_in(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Return the GGUF files under a folder whose names begin so, by the rest of their names."""
    found = {}
    for path in sorted(folder.rglob("*.[gG][gG][uU][fF]")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(prefix) and path.is_file():
            found[name.removeprefix(prefix)] = path
    return found


def is_whole(path: Path) -> bool:
    """Return whether all the files that a model is split into lie beside each other."""
    return all((path.parent / name).is_file() for name in shard_names(path.name))


def _llama_caches() -> Iterator[Path]:
    if given := os.environ.get("LLAMA_CACHE"):
        yield Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if sys.platform == "darwin":
        yield Path.home() / "Library/Caches/llama.cpp"
    elif sys.platform == "win32":
        yield Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "llama.cpp"
    yield (Path(base).expanduser() if base else Path.home() / ".cache") / "llama.cpp"
