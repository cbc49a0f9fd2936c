"""Chooses among several GGUF files, by name or quantisation."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from quintet.errors import InputError, ModelNotFoundError, listed, shown
from quintet.gguf import shard_names

SUFFIX = ".gguf"
# What goes with a model and is none: eyes and ears, and what quantisers measured.
_BESIDE = re.compile(r"mmproj|imatrix", re.ASCII | re.IGNORECASE)


def models_among(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the models among file names: the first file of each, and all of its files.

    Names may have folders, parted by "/".
    """
    models: dict[str, tuple[str, ...]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() != SUFFIX or _BESIDE.search(path.name):
            continue
        shards = shard_names(path.name)
        files = tuple(str(path.with_name(shard)) for shard in shards) or (name,)
        models.setdefault(files[0], files)
    return models


def choose(names: Iterable[str], wanted: str | None, where: str) -> tuple[str, ...]:
    """Return the files of the model that is meant.

    Args:
        names: of all files there are.
        wanted: a file's name, or the name of a quantisation in it, such as Q4_K_M; None where
            there is one alone.
        where: what has these files, for messages.

    Raises:
        ModelNotFoundError: there is none, or none of that name.
        InputError: there are several, which are listed.
    """
    models = models_among(names)
    if not models:
        raise ModelNotFoundError(f"{where} has no model in GGUF")
    found = list(models) if wanted is None else _matching(models, wanted)
    if not found:
        raise ModelNotFoundError(
            f"{where} has no {shown(wanted)}; there are\n{listed(list(models))}"
        )
    if len(found) > 1:
        raise InputError(
            f"{where} has {len(found)} models in GGUF; say which by its name, as NAME:FILE or "
            f"with gguf_file=\n{listed(found)}"
        )
    return models[found[0]]


def _matching(models: Mapping[str, tuple[str, ...]], wanted: str) -> list[str]:
    for first, files in models.items():
        if wanted in files:
            return [first]
    part = re.compile(rf"(?:^|[-_./]){re.escape(wanted)}(?=$|[-./])", re.IGNORECASE)
    # Without the folders of a file that says it itself, and without its number.
    stems = {first: re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", first, flags=re.I) for first in models}
    found = [first for first, stem in stems.items() if part.search(stem)]
    # "Q4_K_M" is also in UD-Q4_K_M, which is another recipe.
    plain = [first for first in found if not re.search(rf"UD-{re.escape(wanted)}", first, re.I)]
    return plain if len(plain) == 1 else found
