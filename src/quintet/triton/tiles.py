"""A tile of a product: some rows of a weight times some vectors, on tensor cores."""

import triton
import triton.language as tl

from quintet.triton.weights import columns_of, stored, widened


@triton.jit
def times_rows(  # type: ignore[no-untyped-def]
    x,
    x_rows,
    valid,
    weight,
    scale,
    offset,
    row_step,
    scale_step,
    o,
    inside,
    start,
    end,
    K,
    BLOCK: tl.constexpr,
    NUMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Return rows o of a weight times vectors, (rows, vectors) in float32.

    Args:
        x_rows: where each vector begins; those not `valid` are zeros.
        start: the first column that is multiplied, of a whole step; `end` is behind the last.
    """
    HALVES: tl.constexpr = 2 if NUMBERS == 2 or NUMBERS == 3 else 1
    rows = o.to(tl.int64) * row_step
    of_groups = (o // HEIGHT).to(tl.int64) * scale_step
    y = tl.zeros([o.shape[0], x_rows.shape[0]], tl.float32)
    for k in range(start, end, BLOCK):
        raw = stored(weight, rows, inside, k, K, BLOCK, NUMBERS)
        for half in tl.static_range(HALVES):
            c = columns_of(k, BLOCK, NUMBERS, half)
            v = tl.load(
                x + x_rows[None, :] + c[:, None], mask=valid[None, :] & (c < K)[:, None], other=0.0
            )
            n = widened(
                raw, scale, offset, of_groups, inside, k, K, BLOCK, half, NUMBERS, GROUP, WHOLE,
                OFFSET,
            )  # fmt: skip
            y = tl.dot(n.to(v.dtype), v, y, input_precision="ieee")
    if WHOLE:
        y *= tl.load(scale + of_groups, mask=inside, other=0.0).to(tl.float32)[:, None]
    return y
