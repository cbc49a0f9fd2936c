"""Finds a program's sequence and tile, with lengths only the device knows."""

import triton
import triton.language as tl


@triton.jit
def text_of(ends, rows, counts, text, most):  # type: ignore[no-untyped-def]
    """Return a text's first token, its numbers of tokens and of real ones, and its row."""
    if ends is None:
        begin = text * most
        length = text * 0 + most
    else:
        begin = tl.load(ends + text)
        length = tl.load(ends + text + 1) - begin
    real = length
    if counts is not None:
        real = tl.load(counts + text).to(tl.int32)
    row = text
    if rows is not None:
        row = tl.load(rows + text)
    return begin.to(tl.int64), length, real, row.to(tl.int64)


@triton.jit
def sequence_of(ends, n, token):  # type: ignore[no-untyped-def]
    """Return the sequence of a token, n if it has none."""
    low = token * 0
    high = low + n
    while low < high:
        middle = (low + high) // 2
        if tl.load(ends + middle + 1) <= token:
            low = middle + 1
        else:
            high = middle
    return low
