"""The short causal convolution of texts, each behind its window (arXiv:2405.21060, §7)."""

import triton
import triton.language as tl
from torch import Tensor

from quintet.triton.finding import text_of
from quintet.triton.launching import cdiv, launch, power_of_two
from quintet.triton.texts import Texts

# Tokens of a program, which have to hold all that is read of the inputs before a text.
TOKENS = 16
WIDEST = TOKENS
CHANNELS = 128


def convolve(
    raw: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    texts: Texts,
    before: Tensor | None,
    next_window: Tensor | None,
) -> Tensor:
    """Return silu(bias + Σ_w taps_w · raw_{t+w-W+1}), (N, C), and write the next window.

    The sum is made in float32, rounded, and rounded again behind silu, as the steps do.

    Shapes: raw (N, C), taps (C, W), bias (C); before, what was kept of each text, None for zeros,
    and kept, what is from now on, None for nothing, (R, W - 1, C) each, of the same memory or not.
    """
    (N, C), W = raw.shape, taps.shape[1]
    output = raw.new_empty(N, C)
    tile = min(power_of_two(texts.most), TOKENS)
    # The program of a text's first tokens alone reads and writes what is kept of it.
    tile = max(tile, power_of_two(W - 1))
    launch(
        _convolve,
        (cdiv(texts.most, tile) or 1, texts.n, cdiv(C, CHANNELS)),
        raw,
        raw.stride(0),
        taps,
        *taps.stride(),
        bias,
        before,
        *((0, 0) if before is None else before.stride()[:2]),
        next_window,
        *((0, 0) if next_window is None else next_window.stride()[:2]),
        output,
        texts.ends,
        texts.rows,
        texts.counts,
        texts.most,
        C,
        W=W,
        TOKENS=tile,
        CHANNELS=CHANNELS,
    )
    return output


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    raw,
    raw_step,
    taps,
    tap_channel,
    tap_step,
    bias,
    before,
    before_row,
    before_step,
    next_window,
    kept_row,
    kept_step,
    output,
    ends,
    rows,
    counts,
    most,
    C,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    begin, length, real, row = text_of(ends, rows, counts, tl.program_id(1), most)
    first = tl.program_id(0) * TOKENS
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    t = first + tl.arange(0, TOKENS)
    inside = c < C
    # A text that is nowhere has nothing that was kept.
    writes = c < tl.where(row >= 0, C, 0)
    valid = (t < length)[:, None] & inside[None, :]
    kinds = output.dtype.element_ty
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        s = t + w - (W - 1)
        x = tl.load(
            raw + (begin + s)[:, None] * raw_step + c[None, :],
            mask=valid & (s >= 0)[:, None],
            other=0.0,
        ).to(tl.float32)
        if before is not None:
            # One of both is zero.
            x += tl.load(
                before + row * before_row + (t + w)[:, None] * before_step + c[None, :],
                mask=(t < length)[:, None] & (s < 0)[:, None] & writes[None, :],
                other=0.0,
            ).to(tl.float32)
        tap = tl.load(taps + c * tap_channel + w * tap_step, mask=inside, other=0.0)
        total += x * tap.to(tl.float32)[None, :]
    y = total.to(kinds).to(tl.float32)
    y = y * tl.sigmoid(y)
    at = (begin + t)[:, None] * C + c[None, :]
    tl.store(output + at, y.to(kinds), mask=valid)
    # All threads have read what others now overwrite.
    tl.debug_barrier()
    if next_window is not None:  # noqa: SIM102 - one is known when it is compiled, one when it runs
        if first == 0:
            for w in tl.static_range(W - 1):
                place = real - (W - 1) + w
                new = c < tl.where(place >= 0, C, 0)
                last = tl.load(raw + (begin + place) * raw_step + c, mask=new, other=0.0)
                if before is not None:
                    old = c < tl.where((row >= 0) & (place < 0), C, 0)
                    from_ = before + row * before_row + (real + w) * before_step
                    last = tl.where(new, last, tl.load(from_ + c, mask=old, other=0.0))
                tl.store(next_window + row * kept_row + w * kept_step + c, last, mask=writes)
