"""A GGUF file: its metadata, and where its tensors lie; nothing is believed before it is checked.

Little-endian numbers: "GGUF", a version, the number of tensors and of keys, the keys with their
values, the tensors' names, shapes, types and offsets, and from the next multiple of
`general.alignment` on their data. A model that is split has all of its metadata in the first file.
"""

import mmap
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from quintet.errors import CheckpointError, ModelNotFoundError, shown
from quintet.folder import find_file
from quintet.gguf.cursor import Cursor, Value
from quintet.gguf.sniffing import MAGIC, refuse_other
from quintet.gguf.types import REMOVED, TYPES, BlockType

Stamp = tuple[int, int, int]
MAX_TENSORS = 1_000_000
MAX_KEYS = 100_000
MAX_NAME = 255
MAX_AXES = 4
MAX_AXIS = 2**40
MAX_WEIGHTS = 2**60
# The least bytes of an entry: a name of one byte and its length, a type, and a value of one byte;
# or a number of axes, one axis, a type and an offset.
LEAST_KEY = 8 + 1 + 4 + 1
LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
ALIGNMENT = "general.alignment"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """The entry of a tensor.

    Attributes:
        shape: as PyTorch orders axes: the last one is contiguous, and blocks run along it.
        file: the one of a split model that it is in.
        start: where in the file its data begins.
        nbytes: of its data.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A model in GGUF, all files of it as one.

    Attributes:
        path: of the file, or of the first of several.
        metadata: numbers, texts, lists of texts, and arrays of numbers as `array.array`;
            a list of truth values is an array of 0 and 1. Nobody's to change: others may have the
            same.
        tensors: in the order of the files.
        files: all of them, with inode, size and time as they were when they were read.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]
    files: Mapping[Path, Stamp]


@dataclass(frozen=True, slots=True)
class _Part:
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]
    stamp: Stamp


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read and check the head of a GGUF file, and of all files that it is split into.

    Any of these may be given; their data is not touched.

    Raises:
        ModelNotFoundError: there is no such file.
        CheckpointError: a file is damaged, incomplete, missing beside the others, or no GGUF.
    """
    path = Path(path)
    names = shard_names(path.name)
    first = path if not names else _beside(path, names[0])
    parts = {first: _read(first)}
    count = parts[first].metadata.get("split.count", 1)
    if type(count) is not int or count not in (1, len(names) or 1):
        raise CheckpointError(
            f"{first} says that it is one of {shown(count)} files (split.count), which its name "
            "does not: they are to be called NAME-00001-of-00003.gguf and so on"
        )
    if count > 1:
        for name in names[1:]:
            file = _beside(path, name)
            parts[file] = _read(file)
        _check_split(first, [*parts.values()])
    tensors: dict[str, GGUFTensor] = {}
    for file, part in parts.items():
        if twice := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{file} has {shown(min(twice))}, which another file has too")
        tensors |= part.tensors
    stamps = {file: part.stamp for file, part in parts.items()}
    return GGUFFile(first, parts[first].metadata, tensors, stamps)


def shard_names(name: str) -> tuple[str, ...]:
    """Return the names of all files of a split model from that of any; () for no such name."""
    found = _SHARD.fullmatch(name)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]):
        return ()
    count = int(found["count"])
    return tuple(f"{found['stem']}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1))


def _beside(path: Path, name: str) -> Path:
    if name == path.name:
        return path
    if (found := find_file(path.parent, name)) is None:
        raise CheckpointError(
            f"{path} is one of several files of a model, of which {name} is missing beside it; "
            "fetch all of them into one folder"
        )
    return found


def _check_split(first: Path, parts: Sequence[_Part]) -> None:
    for number, part in enumerate(parts):
        place = part.metadata.get("split.no"), part.metadata.get("split.count")
        if place != (number, len(parts)):
            raise CheckpointError(
                f"file {number + 1} of the {len(parts)} of {first} says that it is number "
                f"{shown(place[0])} of {shown(place[1])}, counted from 0 (split.no, split.count)"
            )
    wanted = parts[0].metadata.get("split.tensors.count")
    found = sum(len(part.tensors) for part in parts)
    if wanted is not None and wanted != found:
        raise CheckpointError(
            f"the files of {first} have {found} tensors, not {shown(wanted)} as the first says"
        )


def _read(path: Path) -> _Part:
    try:
        found = path.stat()
        return _read_once(path, (found.st_ino, found.st_size, found.st_mtime_ns))
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"there is no file {path}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


# Loading a model asks for its configuration, tokenizer, options and weights, one after the other.
@lru_cache(maxsize=4)
def _read_once(path: Path, stamp: Stamp) -> _Part:
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if (found.st_ino, found.st_size, found.st_mtime_ns) != stamp:
            raise CheckpointError(f"{path} was changed while it was opened; open it again")
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} has to be a regular file, and is not")
        refuse_other(path, file.read(64), found.st_size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = _parse(Cursor(data, found.st_size, path, len(MAGIC)))
    return _Part(MappingProxyType(metadata), MappingProxyType(tensors), stamp)


def _parse(cursor: Cursor) -> tuple[dict[str, Value], dict[str, GGUFTensor]]:
    version = cursor.u32("its version")
    if version not in (2, 3):
        raise CheckpointError(f"{cursor.path} is GGUF of version {version}; 2 and 3 can be read")
    tensors = cursor.count("tensors", MAX_TENSORS, LEAST_TENSOR)
    keys = cursor.count("keys", MAX_KEYS, LEAST_KEY)
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = cursor.text("a key")
        if not key or key in metadata:
            cursor.damaged("has a key without a name" if not key else f"has {shown(key)} twice")
        metadata[key] = cursor.value(key)
    alignment = metadata.get(ALIGNMENT, 32)
    if type(alignment) is not int or alignment & (alignment - 1) or not 8 <= alignment <= 65536:
        cursor.damaged(
            f"has {ALIGNMENT}={shown(alignment)}, which has to be a power of two from 8 to 65536"
        )
    entries = {}
    for _ in range(tensors):
        name, shape, kind, offset = _entry(cursor)
        if name in entries:
            cursor.damaged(f"has tensor {shown(name)} twice")
        if offset % alignment:
            cursor.damaged(
                f"has tensor {shown(name)} at byte {offset} of its data, which is no multiple of "
                f"{alignment}"
            )
        entries[name] = (shape, kind, offset)
    start = -(-cursor.position // alignment) * alignment
    found = {
        name: GGUFTensor(name, shape, kind, cursor.path, start + offset, _size(shape, kind))
        for name, (shape, kind, offset) in entries.items()
    }
    _check_places(cursor, found, start, alignment)
    return metadata, found


def _entry(cursor: Cursor) -> tuple[str, tuple[int, ...], BlockType, int]:
    name = cursor.text("the name of a tensor", MAX_NAME)
    if not name:
        cursor.damaged("has a tensor without a name")
    tensor = f"has tensor {shown(name)}"
    axes = cursor.u32(f"the axes of {shown(name)}")
    if not 1 <= axes <= MAX_AXES:
        cursor.damaged(f"{tensor} with {axes} axes; there are 1 to {MAX_AXES}")
    # The file has the contiguous axis first.
    shape = tuple(cursor.u64(f"the shape of {shown(name)}") for _ in range(axes))[::-1]
    weights = 1
    for size in shape:
        weights *= size
    if not all(1 <= size <= MAX_AXIS for size in shape) or weights >= MAX_WEIGHTS:
        cursor.damaged(f"{tensor} of the impossible shape {list(shape)}")
    kind = _kind(cursor, name, cursor.u32(f"the type of {shown(name)}"))
    if shape[-1] % kind.weights:
        cursor.damaged(
            f"{tensor} of shape {list(shape)}, whose rows cannot be in {kind.name}: that has "
            f"blocks of {kind.weights}"
        )
    return name, shape, kind, cursor.u64(f"the place of {shown(name)}")


def _kind(cursor: Cursor, name: str, number: int) -> BlockType:
    if number in TYPES:
        return TYPES[number]
    known = f"{REMOVED[number]} ({number})" if number in REMOVED else str(number)
    raise CheckpointError(
        f"{cursor.path} has tensor {shown(name)} of type {known}, which cannot be read; known are "
        f"{', '.join(kind.name for kind in TYPES.values())}"
    )


def _size(shape: tuple[int, ...], kind: BlockType) -> int:
    weights = 1
    for size in shape:
        weights *= size
    return weights // kind.weights * kind.nbytes


def _check_places(
    cursor: Cursor, tensors: Mapping[str, GGUFTensor], start: int, alignment: int
) -> None:
    """Check that tensors lie one after the other, all of them, with nothing between or behind."""
    reached = start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start != reached:
            kind = "a gap before" if tensor.start > reached else "an overlap at"
            cursor.damaged(
                f"has {kind} tensor {shown(tensor.name)}, which begins at byte {tensor.start}, "
                f"not at {reached}"
            )
        end = tensor.start + tensor.nbytes
        if end > cursor.size:
            _truncated(cursor, tensors, tensor)
        reached = -(-end // alignment) * alignment
    if tensors and cursor.size > reached:
        cursor.damaged(
            f"has {cursor.size - reached} bytes after its last tensor, of which nothing is said"
        )


def _truncated(cursor: Cursor, tensors: Mapping[str, GGUFTensor], cut: GGUFTensor) -> NoReturn:
    needed = max(tensor.start + tensor.nbytes for tensor in tensors.values())
    cursor.damaged(
        f"is truncated: tensor {shown(cut.name)} ends at byte {cut.start + cut.nbytes}, and all "
        f"of it needs {needed} bytes, of which there are {cursor.size}"
    )
