"""One stored token of llama.cpp made into many."""

import struct

import numpy as np
import pytest

from benchmarks.llama_state import lengthened

MAGIC = 0x12345678


def stored(depth: int, row: int, *, values: str = "rows", cells: int | None = None) -> bytes:
    """What llama.cpp stores of sequence `row` of two: two layers of four halves a token."""
    made = struct.pack("<III", MAGIC, row, 2)
    for stream in range(2):
        if stream != row:
            made += struct.pack("<I", 0)
            continue
        made += struct.pack("<I", depth if cells is None else cells)
        for at in range(depth):
            made += struct.pack("<iIi", at, 1, row)
        made += struct.pack("<II", values == "columns", 2)
        for _ in range(2):
            made += struct.pack("<iQ", 1, 8) + bytes(8 * depth)
        if values == "rows":
            made += 2 * (struct.pack("<iQ", 1, 8) + bytes(8 * depth))
        if values == "columns":
            made += 2 * (struct.pack("<iII", 1, 2, 4) + bytes(8 * depth))
    return made


@pytest.mark.parametrize("values", ["rows", "columns", "none"])
@pytest.mark.parametrize("row", [0, 1])
def test_as_if_the_tokens_had_been_stored(row: int, values: str) -> None:
    made = lengthened(stored(1, row, values=values), 5)
    like = stored(5, row, values=values)
    assert len(made) == len(like)
    # Where the other is not zero, both are the same: all but keys and values.
    differ = [b for a, b in zip(made, like, strict=True) if a != b]
    assert set(differ) == {0}


def test_the_content_is_ordinary_numbers() -> None:
    made = lengthened(stored(1, 0), 5)
    at = made.index(struct.pack("<iQ", 1, 8)) + 12
    numbers = np.frombuffer(made[at : at + 40], dtype=np.float16)
    assert np.isfinite(numbers).all()
    assert len(np.unique(numbers)) > 10


def test_another_layout_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not understood"):
        lengthened(stored(1, 0) + b"more", 5)
    with pytest.raises(RuntimeError, match="2 cells"):
        lengthened(stored(1, 0, cells=2), 5)
