"""Encoded documents on the disk: read without being in memory, written whole or not at all.

A store is a folder of plain little-endian arrays and `store.json`, which says what they are; it is
written last, into a folder that is then renamed.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from quintet.errors import SaveError, shown
from quintet.files import MAX_LISTING_BYTES, read_json

# Of what lies in the folder, and of how texts become ids.
VERSION = 1
ABOUT = "store.json"
# Name -> type of an item, of the columns that have one for each document.
COLUMNS: Mapping[str, str] = {
    # Where a document ends among the ids.
    "ends": "<i8",
    # Its bytes of UTF-8.
    "bytes": "<i8",
    # 64 bits of the hash of its text.
    "hashes": "<u8",
    # The number of its file, and its line or row there.
    "files": "<i4",
    "lines": "<i8",
}
IDS, LEARNED = "ids", "learned"
# What nobody has written to for so many seconds, nobody writes any more.
ABANDONED = 3600.0


@dataclass(frozen=True)
class Store:
    """Documents as ids, one after the other.

    Attributes:
        ids: of all documents.
        learned: 1 for each id that is learned, or None if all are.
        ends: where each document ends.
        bytes: how many bytes of text each has.
        hashes: 64 bits that follow from each one's text.
        files: the number of each one's file in `names`.
        lines: its line or row there, from 1; 0 for a whole file.
        names: the files.
        digest: of everything that can be learned here.
        left_out: how many samples were left out, by the reason, and the first of each.
        kind: what the samples are.
        opening: how many ids stand before each text.
        closing: how many stand behind it.
        largest: the largest id.
    """

    ids: NDArray[Any]
    learned: NDArray[np.uint8] | None
    ends: NDArray[np.int64]
    bytes: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    files: NDArray[np.int32]
    lines: NDArray[np.int64]
    names: Sequence[str]
    digest: str
    left_out: Mapping[str, tuple[int, str]]
    kind: str
    opening: int
    closing: int
    largest: int

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def starts(self) -> NDArray[np.int64]:
        """The offsets at which documents begin."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    def place(self, document: int) -> str:
        """Return the name of a document: its file, and its line there."""
        line = int(self.lines[document])
        name = self.names[int(self.files[document])]
        return f"{name}:{line}" if line else name

    @classmethod
    def open(cls, folder: Path) -> Self | None:
        """Return the store in a folder; None if there is none, or not a whole one."""
        try:
            about = read_json(folder / ABOUT, MAX_LISTING_BYTES)
            if about["version"] != VERSION:
                return None
            n, tokens, kind = about["documents"], about["tokens"], about["dtype"]
            columns = {name: _mapped(folder, name, dtype, n) for name, dtype in COLUMNS.items()}
            return cls(
                ids=_mapped(folder, IDS, kind, tokens),
                learned=_mapped(folder, LEARNED, "|u1", tokens) if about["masked"] else None,
                names=about["names"],
                digest=about["digest"],
                left_out={reason: (n, first) for reason, (n, first) in about["left_out"].items()},
                kind=about["kind"],
                opening=about["opening"],
                closing=about["closing"],
                largest=about["largest"],
                **columns,
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _mapped(folder: Path, name: str, kind: str, n: int) -> NDArray[Any]:
    path = folder / f"{name}.bin"
    if path.stat().st_size != n * np.dtype(kind).itemsize:
        raise ValueError(f"{path} is not whole")
    # An empty file cannot be mapped. As a plain array, a slice takes a tenth of the time.
    return np.asarray(np.memmap(path, kind, "r", shape=(n,))) if n else np.zeros(0, kind)


class StoreWriter:
    """Writes a store; used in a `with`, at the end of which it is there or nothing is.

    Args:
        folder: where the store will be.
        vocab_size: no id is larger.
        masked: whether not everything is learned.

    Raises:
        SaveError: the folder cannot be written.
    """

    def __init__(self, folder: Path, vocab_size: int, *, masked: bool) -> None:
        self.folder = folder
        self._new = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._masked = masked
        self._columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
        self._tokens = self._documents = self._largest = 0
        self._open: dict[str, BinaryIO] = {}
        self._digest, self._document = hashlib.sha256(), hashlib.sha256()
        self._length = 0

    def __enter__(self) -> Self:
        with _write_errors(self.folder):
            self._new.mkdir(parents=True)
            self._tidy()
            names = [IDS, *COLUMNS, *([LEARNED] if self._masked else [])]
            for name in names:
                self._open[name] = (self._new / f"{name}.bin").open("xb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._open.values():
            file.close()
        shutil.rmtree(self._new, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove the leavings of killed processes from this store."""
        for old in self.folder.parent.glob(f".{self.folder.name}.*"):
            times = [path.stat().st_mtime for path in (old, *old.iterdir())]
            if time.time() - max(times) > ABANDONED:
                shutil.rmtree(old, ignore_errors=True)

    def extend(self, ids: Sequence[int], learned: Sequence[int] | None = None) -> None:
        """Add ids to the document that is being written.

        Raises:
            SaveError: the disk is full.
        """
        self._largest = max(self._largest, *ids) if ids else self._largest
        with _write_errors(self.folder):
            self._put(IDS, np.array(ids, self._dtype))
            if self._masked:
                ones = np.ones(len(ids), np.uint8)
                self._put(LEARNED, ones if learned is None else np.array(learned, np.uint8))
        self._length += len(ids)

    def forget(self) -> None:
        """Take back the tokens added to the document that is being written.

        Raises:
            SaveError: the disk is full.
        """
        with _write_errors(self.folder):
            for name, size in ((IDS, self._dtype.itemsize), (LEARNED, 1)):
                if name in self._open:
                    self._open[name].seek(self._tokens * size)
                    self._open[name].truncate()
        self._document, self._length = hashlib.sha256(), 0

    def close(self, *, size: int, text_hash: bytes, file: int, line: int) -> None:
        """End the document that is being written.

        Raises:
            SaveError: the disk is full.
        """
        self._document.update(text_hash[:8])
        self._digest.update(self._document.digest())
        self._tokens += self._length
        self._documents += 1
        self._document, self._length = hashlib.sha256(), 0
        values = (self._tokens, size, int.from_bytes(text_hash[:8], "little"), file, line)
        for name, value in zip(COLUMNS, values, strict=True):
            self._columns[name].append(value)
        if len(self._columns["ends"]) >= 1 << 14:
            with _write_errors(self.folder):
                self._flush()

    def finish(
        self,
        names: Sequence[str],
        left_out: Mapping[str, tuple[int, str]],
        kind: str,
        around: tuple[int, int],
    ) -> Store:
        """Put the store into its place, and open it.

        Args:
            names: the files.
            left_out: how many samples were left out, by the reason, and the first of each.
            kind: what the samples are.
            around: how many ids stand before and behind each text.

        Raises:
            SaveError: the disk is full.
        """
        about = {
            "version": VERSION,
            "documents": self._documents,
            "tokens": self._tokens,
            "dtype": self._dtype.str,
            "masked": self._masked,
            "kind": kind,
            "digest": self._digest.hexdigest(),
            "largest": self._largest,
            "opening": around[0],
            "closing": around[1],
            "names": list(names),
            "left_out": {
                reason: list(count_and_example) for reason, count_and_example in left_out.items()
            },
        }
        with _write_errors(self.folder):
            self._flush()
            for file in self._open.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            (self._new / ABOUT).write_text(json.dumps(about), encoding="utf-8")
            if Store.open(self.folder) is None:
                # What lies there is not whole, or of another version.
                shutil.rmtree(self.folder, ignore_errors=True)
                self._new.rename(self.folder)
        store = Store.open(self.folder)
        if store is None:
            raise SaveError(f"{shown(str(self.folder))} was written and cannot be read again")
        return store

    def _put(self, name: str, values: NDArray[Any]) -> None:
        raw = values.tobytes()
        self._document.update(raw)
        self._open[name].write(raw)

    def _flush(self) -> None:
        for name, dtype in COLUMNS.items():
            self._open[name].write(np.array(self._columns[name], dtype).tobytes())
            self._columns[name].clear()


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into a SaveError that names the folder of encoded texts."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"could not write {shown(str(folder))}, where encoded texts are kept: "
            f"{error.strerror or error}; free some space, or set data.cache to another folder"
        ) from error
