"""Experts of many tokens: a few launches for all experts of a layer.

Choices are sorted by expert (`sorting.py`). A tile is some rows of one expert and some outputs;
its weights are widened in registers. Weights are the left side of products, rows the right one, as
tensor cores take 64 of the first and as few as eight of the second. What an expert makes of a token
is put where the choice stands, and a last pass sums those of a token in their order: no result
depends on which program comes first.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quintet.kernels.linear import batch_invariant
from quintet.triton.launching import cdiv, launch, power_of_two
from quintet.triton.sorting import by_expert, most_tiles, tile_of
from quintet.triton.tiles import times_rows
from quintet.triton.weights import KernelWeight, columns_of, stored, widened


class TileShape(NamedTuple):
    """A program's tile: rows of an expert, outputs, and columns per step."""

    rows: int
    outputs: int
    columns: int = 64


def shape_for(choices: int, E: int, dtype: torch.dtype) -> TileShape:
    """Return the shape of tiles: the expected number of an expert's rows.

    Steps have 64 columns: two numbers of four bits a byte begin anew every 64, and three steps
    of the largest tiles fit the shared memory of an A100.
    """
    if batch_invariant():
        # Of one shape whoever shares the batch.
        return TileShape(32, 64)
    expected = cdiv(choices, E)
    rows = min(max(power_of_two(expected), 16), 32 if dtype == torch.float32 else 128)
    return TileShape(rows, 64)


def grouped_experts(
    x: Tensor,
    gate: KernelWeight,
    up: KernelWeight,
    down: KernelWeight,
    indices: Tensor,
    shares: Tensor,
) -> Tensor:
    """Return Σ share · down(silu(gate x) · up x) over a token's experts.

    Shapes: x (N, C); indices and shares (N, A) without gaps.
    """
    (N, A), (E, F) = indices.shape, gate.weight.shape[:2]
    C = x.shape[1]
    shape = shape_for(N * A, E, x.dtype)
    order, spans = by_expert(indices, E)
    tiles = most_tiles(N * A, E, shape.rows)
    blocks = {"EXPERTS": power_of_two(E), "ROWS": shape.rows, "OUTPUTS": shape.outputs}
    inside = x.new_empty(N * A, F)
    launch(
        _gate,
        (tiles, cdiv(F, shape.outputs)),
        x,
        x.stride(0),
        *gate.arguments,
        *up.arguments[:3],
        order,
        spans,
        inside,
        C,
        F,
        A,
        E,
        BLOCK=shape.columns,
        **blocks,
        **gate.constants,
    )
    per_choice = x.new_empty(N * A, C)
    launch(
        _down,
        (tiles, cdiv(C, shape.outputs)),
        inside,
        *down.arguments,
        order,
        spans,
        shares,
        per_choice,
        F,
        C,
        E,
        BLOCK=shape.columns,
        **blocks,
        **down.constants,
    )
    output = x.new_empty(N, C)
    wide = min(power_of_two(C), 1024)
    launch(_sum, (N, cdiv(C, wide)), per_choice, output, C, A, BLOCK=wide)
    return output


@triton.jit
def _gate(  # type: ignore[no-untyped-def]
    x,
    x_step,
    gate,
    gate_scale,
    gate_offset,
    expert_step,
    row_step,
    expert_scales,
    scale_step,
    up,
    up_scale,
    up_offset,
    order,
    spans,
    output,
    K,
    F,
    A,
    E,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    NUMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    expert, first, count = tile_of(spans, tl.program_id(0), E, EXPERTS, ROWS)
    if expert >= E:
        return
    r = tl.arange(0, ROWS)
    valid = r < count
    token = tl.load(order + first + r, mask=valid, other=0) // A
    x_rows = token.to(tl.int64) * x_step
    f = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = f < F
    weights = expert.to(tl.int64) * expert_step + f.to(tl.int64) * row_step
    scales = expert.to(tl.int64) * expert_scales + (f // HEIGHT).to(tl.int64) * scale_step
    g = tl.zeros([OUTPUTS, ROWS], tl.float32)
    u = tl.zeros([OUTPUTS, ROWS], tl.float32)
    HALVES: tl.constexpr = 2 if NUMBERS == 2 or NUMBERS == 3 else 1
    for k in range(0, K, BLOCK):
        raw_g = stored(gate, weights, inside, k, K, BLOCK, NUMBERS)
        raw_u = stored(up, weights, inside, k, K, BLOCK, NUMBERS)
        for half in tl.static_range(HALVES):
            c = columns_of(k, BLOCK, NUMBERS, half)
            v = tl.load(
                x + x_rows[None, :] + c[:, None], mask=valid[None, :] & (c < K)[:, None], other=0.0
            )
            n = widened(
                raw_g, gate_scale, gate_offset, scales, inside, k, K, BLOCK, half, NUMBERS, GROUP,
                WHOLE, OFFSET,
            )  # fmt: skip
            g = tl.dot(n.to(v.dtype), v, g, input_precision="ieee")
            n = widened(
                raw_u, up_scale, up_offset, scales, inside, k, K, BLOCK, half, NUMBERS, GROUP,
                WHOLE, OFFSET,
            )  # fmt: skip
            u = tl.dot(n.to(v.dtype), v, u, input_precision="ieee")
    if WHOLE:
        g *= tl.load(gate_scale + scales, mask=inside, other=0.0).to(tl.float32)[:, None]
        u *= tl.load(up_scale + scales, mask=inside, other=0.0).to(tl.float32)[:, None]
    y = g * tl.sigmoid(g) * u
    at = (first + r).to(tl.int64)[None, :] * F + f[:, None]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=inside[:, None] & valid[None, :])


@triton.jit
def _down(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    offset,
    expert_step,
    row_step,
    expert_scales,
    scale_step,
    order,
    spans,
    shares,
    output,
    K,
    O,
    E,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    NUMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    expert, first, count = tile_of(spans, tl.program_id(0), E, EXPERTS, ROWS)
    if expert >= E:
        return
    r = tl.arange(0, ROWS)
    valid = r < count
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = o < O
    wide = expert.to(tl.int64)
    y = times_rows(
        x, (first + r).to(tl.int64) * K, valid, weight + wide * expert_step,
        scale + wide * expert_scales, offset + wide * expert_scales, row_step, scale_step,
        o, inside, 0, K, K, BLOCK, NUMBERS, GROUP, HEIGHT, WHOLE, OFFSET,
    )  # fmt: skip
    choice = tl.load(order + first + r, mask=valid, other=0)
    y *= tl.load(shares + choice, mask=valid, other=0.0).to(tl.float32)[None, :]
    at = choice.to(tl.int64)[None, :] * O + o[:, None]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=inside[:, None] & valid[None, :])


@triton.jit
def _sum(per_choice, output, C, A, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for a in range(A):
        total += tl.load(per_choice + (n * A + a) * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(output + n * C + c, total.to(output.dtype.element_ty), mask=c < C)
