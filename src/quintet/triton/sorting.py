"""Choices of experts sorted by expert, on the device: nobody there waits for counts.

A program for each expert counts the choices before its own, and writes down where its own stand,
in their order. The tiles that experts fill with their rows are counted by every program of a
product by itself: a grid is as large as it could have to be, and what is too many returns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quintet.triton.launching import cdiv, launch, power_of_two


def by_expert(indices: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """Return the order that sorts the flat choices (N·A), and each expert's first and count.

    Shapes: indices (N, A) without gaps; returns int32 (N·A) and (2, E).
    """
    total = indices.numel()
    order = indices.new_empty(total, dtype=torch.int32)
    spans = indices.new_empty((2, E), dtype=torch.int32)
    block = min(max(power_of_two(total), 16), 4096)
    launch(
        _sort, (E,), indices, order, spans, total, E, BLOCK=block, num_warps=max(block // 512, 1)
    )
    return order, spans


def most_tiles(choices: int, E: int, rows: int) -> int:
    """Return the maximum number of tiles of this many rows for the choices of E experts."""
    return min(choices, cdiv(choices, rows) + E - 1)


@triton.jit
def _sort(indices, order, spans, total, E, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    expert = tl.program_id(0)
    before = 0
    count = 0
    for at in range(0, total, BLOCK):
        i = at + tl.arange(0, BLOCK)
        one = tl.load(indices + i, mask=i < total, other=E)
        before += tl.sum((one < expert).to(tl.int32))
        count += tl.sum((one == expert).to(tl.int32))
    tl.store(spans + expert, before)
    tl.store(spans + E + expert, count)
    for at in range(0, total, BLOCK):
        i = at + tl.arange(0, BLOCK)
        mine = (tl.load(indices + i, mask=i < total, other=E) == expert).to(tl.int32)
        tl.store(order + before + tl.cumsum(mine, 0) - 1, i, mask=mine == 1)
        before += tl.sum(mine)


@triton.jit
def tile_of(spans, tile, E, EXPERTS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the expert of a tile, its first row among all sorted, and its number of rows.

    What is behind the last tile has an expert from E on.
    """
    e = tl.arange(0, EXPERTS)
    count = tl.load(spans + E + e, mask=e < E, other=0)
    tiles = (count + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32))
    mine = e == expert
    done = (tile - tl.sum(tl.where(mine, ends - tiles, 0))) * ROWS
    start = tl.sum(tl.where(mine, tl.load(spans + e, mask=e < E, other=0), 0))
    return expert, start + done, tl.minimum(tl.sum(tl.where(mine, count, 0)) - done, ROWS)
