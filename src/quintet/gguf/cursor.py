"""A place in the head of a GGUF file, which reads on from there and never past the end."""

import struct
from array import array
from mmap import mmap
from pathlib import Path
from typing import NoReturn, TypeAlias, Union

from quintet.errors import CheckpointError, shown

# Python 3.11 cannot say of what an array is, but in quotes.
Value: TypeAlias = Union[bool, int, float, str, list[str], "array[int]", "array[float]"]

MAX_ELEMENTS = 16_000_000
MAX_TEXT = 2**26
# By the numbers of types in files; the same letters in `struct` and `array`.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    10: "Q",
    11: "q",
    12: "d",
}
_BOOL, _TEXT, _ARRAY = 7, 8, 9


class Cursor:
    """Reads numbers, texts and lists, each checked against the bytes that are left."""

    __slots__ = ("data", "path", "position", "size")

    def __init__(self, data: mmap, size: int, path: Path, position: int) -> None:
        self.data, self.size, self.path, self.position = data, size, path, position

    def damaged(self, fault: str) -> NoReturn:
        """Raise the error of a damaged file."""
        raise CheckpointError(
            f"{self.path} {fault}; the file is damaged or incomplete, fetch it again"
        )

    def u32(self, name: str) -> int:
        """Read a number of four bytes."""
        return int(self._number("I", name))

    def u64(self, name: str) -> int:
        """Read a number of eight bytes."""
        return int(self._number("Q", name))

    def count(self, name: str, most: int, least_bytes: int) -> int:
        """Read the number of items that follow, each of at least `least_bytes` bytes."""
        count = self.u64(f"the number of {name}")
        if count > most or count * least_bytes > self.size - self.position:
            self.damaged(
                f"announces {count} {name}, for which {self.size - self.position} bytes are left "
                f"(the most is {most})"
            )
        return count

    def text(self, name: str, most: int = MAX_TEXT) -> str:
        """Read a text."""
        length = self.u64(f"the length of {name}")
        begin = self.position
        if length > most:
            self.damaged(f"has {name} of {length} bytes; the most is {most}")
        self._advance(length, name)
        return self._decoded(self.data[begin : self.position], name)

    def value(self, key: str) -> Value:
        """Read the value of a key: its type, and the value of that type."""
        name = shown(key)
        kind = self.u32(f"the type of {name}")
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], name)
        if kind == _BOOL:
            return bool(self._truths(1, name)[0])
        if kind == _TEXT:
            return self.text(name)
        if kind != _ARRAY:
            self.damaged(f"has {name} of the unknown type {kind}")
        return self._list(name)

    def _list(self, name: str) -> Value:
        kind = self.u32(f"the type of {name}")
        letter = _NUMBERS.get(kind)
        least = 8 if kind == _TEXT else 1 if letter is None else struct.calcsize(f"<{letter}")
        count = self.count(f"values of {name}", MAX_ELEMENTS, least)
        if letter is not None:
            begin = self.position
            self._advance(count * least, name)
            numbers = array(letter)
            numbers.frombytes(self.data[begin : self.position])
            return numbers
        if kind == _BOOL:
            return array("B", self._truths(count, name))
        if kind != _TEXT:
            self.damaged(f"has {name}, a list of the type {kind}, which is not read in lists")
        return self._texts(count, name)

    def _texts(self, count: int, name: str) -> list[str]:
        # Hundreds of thousands of tokens: as few calls for each as can be.
        data, size, position = self.data, self.size, self.position
        unpack, most = struct.Struct("<Q").unpack_from, MAX_TEXT
        texts = []
        for _ in range(count):
            begin = position + 8
            if begin > size:
                self._ended(name)
            position = begin + unpack(data, position)[0]
            if position > size or position - begin > most:
                self.damaged(f"has a text of {position - begin} bytes in {name}")
            raw = data[begin:position]
            try:
                texts.append(raw.decode())
            except UnicodeDecodeError:
                self._decoded(raw, f"a text in {name}")
        self.position = position
        return texts

    def _truths(self, count: int, name: str) -> bytes:
        begin = self.position
        self._advance(count, name)
        raw = self.data[begin : self.position]
        if raw.translate(None, b"\0\1"):
            self.damaged(f"has {name} that is neither true nor false")
        return raw

    def _number(self, letter: str, name: str) -> int | float:
        begin = self.position
        self._advance(struct.calcsize(f"<{letter}"), name)
        value: int | float = struct.unpack_from(f"<{letter}", self.data, begin)[0]
        return value

    def _decoded(self, raw: bytes, name: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.damaged(f"has {name} that is not UTF-8 ({error.reason}): {shown(raw)}")

    def _advance(self, length: int, name: str) -> None:
        if length > self.size - self.position:
            self._ended(name)
        self.position += length

    def _ended(self, name: str) -> NoReturn:
        self.damaged(f"ends after {self.size} bytes, within {name}")
