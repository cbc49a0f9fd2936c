"""The draw of a token from scores that are divided, cut off and summed, in one launch.

A program has a row. It never sorts: the k-th largest score, and the one at which what is left sums
to p, are found by halving what is between the smallest and the largest number there is, a pass
over the row each time. Rows are in the cache by then.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quintet.triton.launching import launch, power_of_two, takes

BLOCK = 4096
Value = float | Tensor


def draw(
    scores: Tensor,
    u: Tensor,
    *,
    temperature: Value | None,
    top_k: int | Tensor | None,
    top_p: Value | None,
    min_p: Value | None,
) -> tuple[Tensor, Tensor] | None:
    """Compute `ops.sampling.draw_in_one_pass`; None if the kernel does not apply.

    Shapes: scores (B, V) in float32, u (B, 1), numbers of rows (B, 1); returns (B,) and (B,).
    """
    values = (temperature, top_k, top_p, min_p)
    of_rows = [x for x in values if isinstance(x, Tensor)]
    if scores.ndim != 2 or not scores.numel() or not takes(scores, u, *of_rows):
        return None
    B, V = scores.shape
    alike = all(x.shape == (B, 1) and x.is_contiguous() for x in (u, *of_rows))
    if scores.dtype != torch.float32 or u.dtype != torch.float32 or not alike:
        return None
    if scores.stride(1) != 1:
        return None
    tokens = scores.new_empty(B, dtype=torch.long)
    best = scores.new_empty(B)
    # What is dropped is a share of 1 - p, as the definition has it.
    share = None if top_p is None else 1 - top_p
    arguments: list[Tensor | float | None] = []
    for value in (temperature, top_k, share, min_p):
        rows = isinstance(value, Tensor)
        arguments += [value, 0] if rows else [None, 0 if value is None else value]
    launch(
        _draw,
        (B,),
        scores,
        scores.stride(0),
        u,
        *arguments,
        tokens,
        best,
        V,
        DIVIDES=temperature is not None,
        COUNTS=top_k is not None,
        SUMS=top_p is not None,
        BARS=min_p is not None,
        BLOCK=min(power_of_two(max(V, 16)), BLOCK),
        num_warps=8,
    )
    return tokens, best


@triton.jit
def _scores(row, at, V, divisor, DIVIDES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scores from `at` on, and integers in their order; columns behind the row are last."""
    i = at + tl.arange(0, BLOCK)
    x = tl.load(row + i, mask=i < V, other=float("-inf"))
    if DIVIDES:
        x = tl.div_rn(x, divisor)
    # There is one zero.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return x, keys


@triton.jit
def _count(row, V, divisor, least, DIVIDES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the number of keys that are at least so large."""
    total = tl.zeros([BLOCK], tl.int32)
    for at in range(0, V, BLOCK):
        _, keys = _scores(row, at, V, divisor, DIVIDES, BLOCK)
        total += (keys >= least).to(tl.int32)
    return tl.sum(total)


@triton.jit
def _mass(  # type: ignore[no-untyped-def]
    row, V, divisor, top, least, below, DIVIDES: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the sum of exp(score - top) over keys from `least` on and below another."""
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, V, BLOCK):
        x, keys = _scores(row, at, V, divisor, DIVIDES, BLOCK)
        some = (keys >= least) & (keys < below)
        total += tl.where(some, tl.exp(x - top), 0.0)
    return tl.sum(total)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    scores,
    step,
    u,
    divisors,
    divisor,
    counts,
    count,
    shares,
    share,
    bars,
    bar,
    tokens,
    best,
    V,
    DIVIDES: tl.constexpr,
    COUNTS: tl.constexpr,
    SUMS: tl.constexpr,
    BARS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = scores + n * step
    t = tl.load(u + n) * 0.0 + divisor
    if divisors is not None:
        t = tl.load(divisors + n).to(tl.float32)
    top = float("-inf")
    numbers = 0
    for at in range(0, V, BLOCK):
        x, _ = _scores(row, at, V, t, DIVIDES, BLOCK)
        is_one = x == x
        numbers += tl.sum(is_one.to(tl.int32))
        top = tl.maximum(top, tl.max(tl.where(is_one, x, float("-inf"))))
    whole = tl.cdiv(V, BLOCK) * BLOCK
    largest = tl.where(numbers < whole, float("nan"), top)
    tl.store(best + n, largest)
    if (largest > float("-inf")) & (largest < float("inf")):
        bits = (largest + 0.0).to(tl.int32, bitcast=True)
        last = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        # The key of -inf, and one that is above all others.
        least = last * 0 - 2139095041
        above = last + 1
        if COUNTS:
            k = tl.minimum(last * 0 + count, V)
            if counts is not None:
                k = tl.minimum(tl.load(counts + n), V).to(tl.int32)
            low = least.to(tl.int64)
            high = last.to(tl.int64)
            while low < high:
                middle = (low + high + 1) >> 1
                found = _count(row, V, t, middle.to(tl.int32), DIVIDES, BLOCK)
                low = tl.where(found >= k, middle, low)
                # Exactly so many: what ties with the last of them is among them.
                high = tl.where(found == k, low, tl.where(found >= k, high, middle - 1))
            least = low.to(tl.int32)
        # Of tokens that tie with the least likely one, the first are dropped.
        tied = least
        dropped = last * 0
        if SUMS:
            limit = t * 0.0 + share
            if shares is not None:
                limit = tl.load(shares + n).to(tl.float32)
            limit *= _mass(row, V, t, top, least, above, DIVIDES, BLOCK)
            low = least.to(tl.int64)
            high = last.to(tl.int64)
            while low < high:
                middle = (low + high + 1) >> 1
                below = _mass(row, V, t, top, least, middle.to(tl.int32), DIVIDES, BLOCK)
                low = tl.where(below <= limit, middle, low)
                high = tl.where(below <= limit, high, middle - 1)
            tied = low.to(tl.int32)
            below = _mass(row, V, t, top, least, tied, DIVIDES, BLOCK)
            same = _count(row, V, t, tied, DIVIDES, BLOCK)
            same -= _count(row, V, t, tied + 1, DIVIDES, BLOCK)
            mass_of_each = _mass(row, V, t, top, tied, tied + 1, DIVIDES, BLOCK) / same.to(
                tl.float32
            )
            dropped = tl.minimum((limit - below) / mass_of_each, same.to(tl.float32)).to(tl.int32)
            # The likeliest stays.
            dropped = tl.where(tied == last, tl.minimum(dropped, same - 1), dropped)
            least = tied
        smallest = t * 0.0
        if BARS:
            smallest += bar
            if bars is not None:
                smallest = tl.load(bars + n).to(tl.float32)
        point = 0.0
        total = 0.0
        token = V
        final = 0
        for turn in range(2):
            passed = 0.0
            ties = 0
            for at in range(0, V, BLOCK):
                x, keys = _scores(row, at, V, t, DIVIDES, BLOCK)
                is_tied = (keys == tied).to(tl.int32)
                rank = ties + tl.cumsum(is_tied, 0)
                w = tl.exp(x - top)
                remains = (keys >= least) & ((keys > tied) | (rank > dropped)) & (w >= smallest)
                w = tl.where(remains & (w > 0.0), w, 0.0)
                i = at + tl.arange(0, BLOCK)
                if turn == 1:
                    beyond = (w > 0.0) & (passed + tl.cumsum(w, 0) > point)
                    token = tl.minimum(token, tl.min(tl.where(beyond, i, V)))
                    final = tl.maximum(final, tl.max(tl.where(w > 0.0, i, 0)))
                passed += tl.sum(w)
                ties += tl.sum(is_tied)
            total = passed
            point = tl.load(u + n) * total
        tl.store(tokens + n, tl.where(token < V, token, final).to(tl.int64))
    else:
        tl.store(tokens + n, n * 0)
