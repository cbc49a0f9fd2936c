"""Resolves the files of data settings, and detects changes."""

import fnmatch
import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quintet.errors import ConfigError, DataError, ModelNotFoundError, shown
from quintet.training.data.settings import Format, SourceSettings

ENDINGS: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
UNCLEAR = (".json", ".json.gz")
# So many bytes at the beginning, at the end and in so many places between are looked at, to see
# whether a file of the same name, size and time is another.
EDGE, SPOT, SPOTS = 1 << 16, 1 << 12, 14


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read, and how it is written."""

    path: Path
    format: Format


def files_of(source: SourceSettings, cache: Path) -> list[SourceFile]:
    """Return the files of a source, in an order that is the same everywhere.

    Those in the folder where encoded texts are kept are none of them.

    Raises:
        ModelNotFoundError: a path or pattern names no file.
        ConfigError: all files are excluded, or it is not clear how one is written.
    """
    found: dict[str, None] = {}
    for name in source.paths:
        paths = sorted(path for path in _named(name) if cache not in Path(path).parents)
        if not paths:
            raise ModelNotFoundError(
                f"data: {shown(name)} names no file; paths count from where the command runs, "
                "and ** stands for any folders"
            )
        found.update(dict.fromkeys(paths))
    included = [p for p in found if not any(fnmatch.fnmatchcase(p, x) for x in source.exclude)]
    if not included:
        raise ConfigError(
            f"data: all {len(found)} files of {shown(list(source.paths))} are excluded by "
            f"{shown(list(source.exclude))}; leave some"
        )
    return [SourceFile(Path(path), source.format or _format_of(path)) for path in included]


def _format_of(path: str) -> Format:
    kind = _format(path)
    if kind is None:
        raise ConfigError(
            f"data: {path} can hold a record in each line or be one text; say so by format = "
            "'jsonl' or 'text'. A list of records in one value is written as lines first"
        )
    return kind


def _named(name: str) -> Iterator[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = [p for p in path.rglob("*") if p.is_file() and not _hidden(p, path)]
        # What lies beside records describes them: a card, the files that `datasets` keeps.
        records = [p for p in inside if _format(p.as_posix()) not in ("text", None)]
        yield from (p.as_posix() for p in records or inside)
    elif path.is_file():
        yield path.as_posix()
    else:
        for match in glob.iglob(str(path), recursive=True):
            if Path(match).is_file():
                yield Path(match).as_posix()


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _format(path: str) -> Format | None:
    """Return the format of a file by its suffix; None if that does not tell."""
    name = path.lower()
    if name.endswith(UNCLEAR):
        return None
    return next((kind for end, kind in ENDINGS.items() if name.endswith(end)), "text")


def digest_of(files: Sequence[SourceFile]) -> str:
    """Return a digest of files' names, sizes, times and samples of contents.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            about = file.path.stat()
            identity = [str(file.path.absolute()), about.st_size, about.st_mtime_ns, file.format]
            digest.update(json.dumps(identity).encode())
            with file.path.open("rb") as content:
                size = about.st_size
                if size <= 2 * EDGE:
                    digest.update(content.read())
                    continue
                spots = [(EDGE + (size - 2 * EDGE) * i // SPOTS, SPOT) for i in range(SPOTS)]
                for start, length in [(0, EDGE), *spots, (size - EDGE, EDGE)]:
                    content.seek(start)
                    digest.update(content.read(length))
        except OSError as error:
            raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
