"""The stored sequences of llama.cpp: one token's made into many, so that no prompt has to run."""

import struct

import numpy as np

__all__ = ["lengthened"]

# Numbers drawn once and repeated.
RANDOM = 4_194_301


def lengthened(stored: bytes, depth: int) -> bytes:
    """Return a stored sequence of one token as one of `depth` tokens, with random content.

    The layout of `llama_state_seq_get_data`: a magic number, the sequence, the number of streams;
    of each stream the number of cells, and if there are any: of each cell its position, the number
    of its sequences and those; whether values are transposed; the number of layers; each layer's
    kind of keys, bytes of a cell, and keys; the same of values where there are any, or transposed:
    kind, bytes of a number, channels, and values channel by channel.

    Raises:
        RuntimeError: it is laid out otherwise.
    """
    reader = _Reader(stored)
    reader.copy(8)
    streams = reader.number(reader.copy(4))
    for stream in range(streams):
        cells = reader.number(reader.take(4))
        if cells == 0:
            reader.put(struct.pack("<I", 0))
            continue
        if cells != 1:
            raise RuntimeError(f"llama.cpp stored {cells} cells of a sequence of one token")
        reader.put(struct.pack("<I", depth))
        _, sequences, row = struct.unpack("<iIi", reader.take(12))
        if sequences != 1:
            raise RuntimeError(f"llama.cpp stored a cell of {sequences} sequences")
        reader.put(b"".join(struct.pack("<iIi", at, 1, row) for at in range(depth)))
        transposed, layers = reader.number(reader.copy(4)), reader.number(reader.copy(4))
        for _ in range(layers):
            reader.copy(4)
            reader.lengthen(reader.number(reader.copy(8)), depth)
        if reader.left() == 4 * (streams - stream - 1):
            continue
        for _ in range(layers):
            reader.copy(4)
            size = reader.number(reader.copy(4 if transposed else 8))
            channels = reader.number(reader.copy(4)) if transposed else 1
            reader.lengthen(size * channels, depth)
    if reader.left():
        raise RuntimeError(f"{reader.left()} bytes of what llama.cpp stored are not understood")
    return b"".join(reader.made)


class _Reader:
    """Takes bytes from the front, and puts others together."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0
        self.made: list[bytes] = []
        drawn = np.random.default_rng(0).standard_normal(RANDOM, dtype=np.float32)
        self._random = drawn.astype(np.float16).tobytes()

    def take(self, count: int) -> bytes:
        part = self._content[self._at : self._at + count]
        self._at += count
        return part

    def put(self, part: bytes) -> None:
        self.made.append(part)

    def copy(self, count: int) -> bytes:
        part = self.take(count)
        self.put(part)
        return part

    def lengthen(self, size: int, depth: int) -> None:
        """Replace the `size` bytes of a cell by random ones of `depth` cells."""
        self.take(size)
        wanted = size * depth
        repeats = -(-wanted // len(self._random))
        self.put((self._random * repeats)[:wanted])

    def left(self) -> int:
        return len(self._content) - self._at

    @staticmethod
    def number(part: bytes) -> int:
        return int.from_bytes(part, "little")
