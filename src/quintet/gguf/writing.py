"""A GGUF file, written: its head, and then its tensors piece by piece, in any order."""

import os
import secrets
import struct
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from quintet.errors import SaveError
from quintet.gguf.cursor import Value
from quintet.gguf.sniffing import MAGIC
from quintet.gguf.types import TYPES, BlockType

ALIGNMENT = 32
VERSION = 3
_NUMBER_OF = {kind.name: number for number, kind in TYPES.items()}
# The numbers that files have for types of values.
_OF_ARRAY = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "Q": 10, "q": 11, "d": 12}
_U32, _I32, _F32, _BOOL, _TEXT, _ARRAY, _U64, _I64 = 4, 5, 6, 7, 8, 9, 10, 11


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written; `shape` is in the order of PyTorch."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        count = 1
        for size in self.shape:
            count *= size
        return count // self.kind.weights * self.kind.nbytes


class GGUFWriter:
    """Writes a file whose tensors are known, whole or not at all, as a context.

    The file takes its name once the context ends without an error and every byte was written.

    Raises:
        SaveError: the disk is full, or the folder is not writable.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Value], entries: Iterable[Entry]) -> None:
        self.path = path
        self._entries = {entry.name: entry for entry in entries}
        self._left = {entry.name: entry.nbytes for entry in self._entries.values()}
        self._head, self._starts = _head(metadata, list(self._entries.values()))
        self._scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}")

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._scratch.open("xb")
            self._file.write(self._head)
        except OSError as error:
            raise self._failed(error) from error
        return self

    def write(self, name: str, start: int, data: bytes | memoryview) -> None:
        """Write a piece of a tensor's data, from a byte of it on."""
        self._left[name] -= len(data)
        try:
            self._file.seek(self._starts[name] + start)
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                unwritten = [name for name, left in self._left.items() if left]
                assert not unwritten, f"not written as a whole: {unwritten}"
                # The last tensor is filled up, too.
                self._file.truncate(-(-self._file.seek(0, os.SEEK_END) // ALIGNMENT) * ALIGNMENT)
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if error is None:
                self._scratch.replace(self.path)
        except OSError as failed:
            raise self._failed(failed) from failed
        finally:
            self._file.close()
            self._scratch.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> SaveError:
        return SaveError(f"could not write {self.path}: {error.strerror or error}")


def _head(metadata: Mapping[str, Value], entries: list[Entry]) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the data, and where each tensor's data begins in the file."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += (_text(key), _value(value))
    offsets = {}
    offset = 0
    for entry in entries:
        parts += (
            _text(entry.name),
            struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape[::-1]),
            struct.pack("<IQ", _NUMBER_OF[entry.kind.name], offset),
        )
        offsets[entry.name] = offset
        offset += -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
    head = b"".join(parts)
    head += bytes(-len(head) % ALIGNMENT)
    return head, {name: len(head) + offset for name, offset in offsets.items()}


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        kind, letter = (_U32, "I") if 0 <= value < 2**32 else (_U64, "Q")
        kind, letter = (_I64, "q") if value < 0 else (kind, letter)
        return struct.pack(f"<I{letter}", kind, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    if isinstance(value, array):
        head = struct.pack("<IIQ", _ARRAY, _OF_ARRAY[value.typecode], len(value))
        return head + struct.pack(f"<{len(value)}{value.typecode}", *value)
    return struct.pack("<IIQ", _ARRAY, _TEXT, len(value)) + b"".join(map(_text, value))
