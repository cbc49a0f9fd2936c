"""Which GGUF file a path or a folder stands for."""

import os
from pathlib import Path

from quintet.errors import InputError, ModelNotFoundError, listed, shown
from quintet.folder import checked_path, find_file
from quintet.gguf.container import shard_names
from quintet.gguf.sniffing import MAGIC

__all__ = ["find_gguf", "is_gguf", "models_in"]

SUFFIX = ".gguf"


def is_gguf(path: Path) -> bool:
    """Tell whether a file is GGUF, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def models_in(directory: Path) -> list[str]:
    """Return the names of the GGUF models in a folder; of several files of one, the first.

    Files of images and sounds beside a model are none.
    """
    try:
        names = sorted(name for name in os.listdir(directory) if name.lower().endswith(SUFFIX))
    except OSError:
        return []
    firsts = [name for name in names if (shard_names(name) or (name,))[0] == name]
    return [name for name in firsts or names if "mmproj" not in name.lower()]


def find_gguf(directory: Path, name: str | None = None) -> Path | None:
    """Return the file of that name in a folder, or its only model; None where it has none.

    Raises:
        ModelNotFoundError: there is no file of that name, or there are several models.
        InputError: the name leads out of the folder.
        CheckpointError: it is a link that leads elsewhere.
    """
    if name is None:
        models = models_in(directory)
        if len(models) > 1:
            raise ModelNotFoundError(
                f"{directory} has {len(models)} models in GGUF:\n{listed(models)}\nName one of "
                f"them: {str(directory / models[0])!r}, or gguf_file={models[0]!r}"
            )
        return find_file(directory, models[0]) if models else None
    inside = checked_path(name, "gguf_file")
    if inside.is_absolute() or ".." in inside.parts:
        raise InputError(f"gguf_file={shown(name)} has to be a file in {directory}, by its name")
    found = find_file(directory / inside.parent, inside.name)
    if found is None:
        models = models_in(directory)
        there = f"; there are\n{listed(models)}" if models else ", and no other GGUF"
        raise ModelNotFoundError(f"{directory} has no file {shown(name)}{there}")
    return found
