"""Each vector by itself, with the matrices that are its own: steps of a few sequences.

What bounds these is how fast weights are read. A program has a few rows of a matrix and goes along
them in wide loads, multiplies on plain cores, and adds up once at the end; tensor cores would wait
for memory just the same. A vector that shares a matrix with another finds it in the cache. How many
vectors there are changes nothing in how one is summed.
"""

import triton
import triton.language as tl
from torch import Tensor

from quintet.triton.launching import cdiv, launch, power_of_two
from quintet.triton.weights import KernelWeight, columns_of, stored, widened

# Rows of a program: few, so that the smallest matrices of a layer still occupy a GPU.
ROWS = 4


def gate_vectors(
    x: Tensor,
    gate: KernelWeight,
    up: KernelWeight,
    output: Tensor,
    indices: Tensor | None,
    vectors: int,
) -> None:
    """Write silu(gate x) · up x of each vector, and of each expert that is its own.

    Shapes: x (N, I); made (N·A, F); indices (N, A) or None for one matrix.
    """
    launch(
        _gate_vectors,
        (cdiv(output.shape[1], ROWS), vectors),
        x,
        x.stride(0),
        *gate.arguments,
        *up.arguments[:3],
        indices,
        output,
        x.shape[1],
        output.shape[1],
        1 if indices is None else indices.shape[1],
        CHOSEN=indices is not None,
        BLOCK=_block(x, gate),
        ROWS=ROWS,
        **gate.constants,
    )


def map_vectors(
    x: Tensor,
    weight: KernelWeight,
    bias: Tensor | None,
    output: Tensor,
    indices: Tensor | None = None,
    shares: Tensor | None = None,
) -> None:
    """Write W x + b of each vector; with experts their sum by shares, in the order of choices.

    Shapes: x (N·A, I); made (N, O); indices and shares (N, A).
    """
    launch(
        _map_vectors,
        (cdiv(output.shape[1], ROWS), output.shape[0]),
        x,
        x.stride(0),
        *weight.arguments,
        bias,
        indices,
        shares,
        output,
        x.shape[1],
        output.shape[1],
        1 if indices is None else indices.shape[1],
        CHOSEN=indices is not None,
        BIAS=bias is not None,
        BLOCK=_block(x, weight),
        ROWS=ROWS,
        **weight.constants,
    )


def _block(x: Tensor, weight: KernelWeight) -> int:
    """Return the number of columns per step: 16 bytes a thread and row or two."""
    return max(min(power_of_two(x.shape[1]), 1024 if weight.weight.itemsize == 1 else 512), 64)


@triton.jit
def _times_vector(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    offset,
    row_step,
    scale_step,
    o,
    inside,
    K,
    BLOCK: tl.constexpr,
    NUMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Return rows o of a weight times a vector (K), in float32."""
    HALVES: tl.constexpr = 2 if NUMBERS == 2 or NUMBERS == 3 else 1
    rows = o.to(tl.int64) * row_step
    of_groups = (o // HEIGHT).to(tl.int64) * scale_step
    sums = tl.zeros([o.shape[0], BLOCK // HALVES], tl.float32)
    for k in range(0, K, BLOCK):
        raw = stored(weight, rows, inside, k, K, BLOCK, NUMBERS)
        for half in tl.static_range(HALVES):
            n = widened(
                raw, scale, offset, of_groups, inside, k, K, BLOCK, half, NUMBERS, GROUP, WHOLE,
                OFFSET,
            )  # fmt: skip
            c = columns_of(k, BLOCK, NUMBERS, half)
            sums += n * tl.load(x + c, mask=c < K, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(sums, axis=1)
    if WHOLE:
        total *= tl.load(scale + of_groups, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _gate_vectors(  # type: ignore[no-untyped-def]
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
    indices,
    output,
    K,
    F,
    A,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NUMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1).to(tl.int64)
    inside = f < F
    x += pair // A * x_step
    weights = pair * 0
    scales = pair * 0
    if CHOSEN:
        expert = tl.load(indices + pair).to(tl.int64)
        weights = expert * expert_step
        scales = expert * expert_scales
    g = _times_vector(
        x, gate + weights, gate_scale + scales, gate_offset + scales, row_step, scale_step,
        f, inside, K, BLOCK, NUMBERS, GROUP, HEIGHT, WHOLE, OFFSET,
    )  # fmt: skip
    u = _times_vector(
        x, up + weights, up_scale + scales, up_offset + scales, row_step, scale_step,
        f, inside, K, BLOCK, NUMBERS, GROUP, HEIGHT, WHOLE, OFFSET,
    )  # fmt: skip
    y = g * tl.sigmoid(g) * u
    tl.store(output + pair * F + f, y.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _map_vectors(  # type: ignore[no-untyped-def]
    x,
    x_step,
    weight,
    scale,
    offset,
    expert_step,
    row_step,
    expert_scales,
    scale_step,
    bias,
    indices,
    shares,
    output,
    K,
    O,
    A,
    CHOSEN: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NUMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64)
    inside = o < O
    total = tl.zeros([ROWS], tl.float32)
    for a in range(A):
        pair = n * A + a
        weights = pair * 0
        scales = pair * 0
        if CHOSEN:
            expert = tl.load(indices + pair).to(tl.int64)
            weights = expert * expert_step
            scales = expert * expert_scales
        y = _times_vector(
            x + pair * x_step, weight + weights, scale + scales, offset + scales, row_step,
            scale_step, o, inside, K, BLOCK, NUMBERS, GROUP, HEIGHT, WHOLE, OFFSET,
        )  # fmt: skip
        if CHOSEN:
            y *= tl.load(shares + pair).to(tl.float32)
        total += y
    if BIAS:
        total += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + n * O + o, total.to(output.dtype.element_ty), mask=inside)
