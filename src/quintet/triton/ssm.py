"""The state space of Mamba-2 over texts, each from its own state on (arXiv:2405.21060).

A program has some channels of one head of one text, and their state stays in registers from the
first token to the last; memory sees it once before and once behind. Texts of few tokens go through
the recurrence itself, longer ones chunk by chunk (§6), where tokens meet on tensor cores. Which
of both is a matter of the text alone: no result depends on what shares a batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quintet.triton.finding import text_of
from quintet.triton.launching import cdiv, launch, power_of_two
from quintet.triton.texts import Texts

# Texts of more tokens are taken in chunks.
FEW = 16
# Numbers of a state that a vector of it has, in registers.
LARGEST = 256


class Sizes(NamedTuple):
    """H heads of P channels, and G groups of them with N numbers a channel."""

    H: int
    P: int
    G: int
    N: int


def through_states(
    convolved: Tensor,
    dt: Tensor,
    scalars: tuple[Tensor, Tensor, Tensor],
    limits: tuple[float, float],
    sizes: Sizes,
    texts: Texts,
    before: Tensor | None,
    next_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (M, H·P) and the step sizes (M, H) in float32, and write states.

        S_t = exp(dt_t·A) · S_{t-1} + dt_t · x_t ⊗ b_t,  y_t = S_t · c_t + D · x_t

    Shapes: convolved (M, H·P + 2·G·N) holds x, b and c; dt (M, H) before softplus; dt_bias, A_log
    and D (H); before, states of the texts as they are, None for zeros, and kept, as they are
    from now on, None to keep none, (R, H, P, N) each: they may be the same memory.
    """
    M, (H, P, G, N) = len(convolved), sizes
    y, steps = (convolved.new_empty(M, width, dtype=torch.float32) for width in (H * P, H))
    N_BLOCK = power_of_two(max(N, 16))
    wide = convolved.dtype == torch.float32
    arguments = (
        convolved,
        convolved.stride(0),
        dt,
        dt.stride(0),
        *scalars,
        before,
        0 if before is None else before.stride(0),
        next_state,
        0 if next_state is None else next_state.stride(0),
        y,
        steps,
        texts.ends,
        texts.rows,
        texts.counts,
        texts.most,
        *limits,
    )
    constants = {"H": H, "P": P, "G": G, "N": N, "N_BLOCK": N_BLOCK, "FEW": FEW}
    shares = texts.ends is not None
    if shares or texts.most <= FEW:
        rows = _rows(P, N_BLOCK, 2048)
        launch(_recur, (cdiv(P, rows), H, texts.n), *arguments, P_BLOCK=rows, **constants)
    if texts.most > FEW:
        rows = max(_rows(P, N_BLOCK, 4096), 16)
        launch(
            _scan,
            (cdiv(P, rows), H, texts.n),
            *arguments,
            P_BLOCK=rows,
            # Of float32, what a step reads is twice as large.
            L=32 if wide else 64,
            # float16 has too small a range for states; the numbers of tf32 are as long as its.
            NARROW=convolved.dtype == torch.bfloat16,
            PRECISION="ieee" if wide else "tf32",
            num_stages=1,
            **constants,
        )
    return y, steps


def _rows(P: int, N_BLOCK: int, numbers: int) -> int:
    """Return the number of channels per program, for at most `numbers` numbers of state."""
    return max(min(power_of_two(P), numbers // N_BLOCK), 1)


@triton.jit
def _step_size(dt, least, most):  # type: ignore[no-untyped-def]
    """Return softplus(dt) within limits; NaN stays NaN."""
    e = tl.exp(tl.where(dt > 20.0, 20.0, dt))
    # log(1 + e) as it is, not as 1 + e is rounded.
    one = e + 1.0
    same = one == 1.0
    log = tl.where(same, e, tl.log(one) * (e / tl.where(same, 1.0, one - 1.0)))
    size = tl.where(dt > 20.0, dt, log)
    size = tl.where(size < least, least, size)
    return tl.where(size > most, most, size)


@triton.jit
def _initial_state(before, before_row, row, head, p, n, P, N):  # type: ignore[no-untyped-def]
    """Return the state of a head's channels p, its place in the row, and its mask."""
    # A text that is nowhere begins with zeros, and leaves nothing.
    valid = (p < P)[:, None] & (n < tl.where(row >= 0, N, 0))[None, :]
    place = head * P * N + p[:, None] * N + n[None, :]
    S = tl.zeros([p.shape[0], n.shape[0]], tl.float32)
    if before is not None:
        S = tl.load(before + row * before_row + place, mask=valid, other=0.0)
    return S, place, valid


@triton.jit
def _scalars(dt_bias, A_log, D, head):  # type: ignore[no-untyped-def]
    """Return a head's bias of step sizes, its A, and its D."""
    bias = tl.load(dt_bias + head).to(tl.float32)
    A = -tl.exp(tl.load(A_log + head).to(tl.float32))
    return bias, A, tl.load(D + head).to(tl.float32)


@triton.jit
def _recur(  # type: ignore[no-untyped-def]
    mixed,
    mixed_step,
    raw_dt,
    dt_step,
    dt_bias,
    A_log,
    D,
    before,
    before_row,
    next_state,
    kept_row,
    y,
    steps,
    ends,
    rows,
    counts,
    longest,
    least,
    most,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    N_BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    P_BLOCK: tl.constexpr,
):
    begin, length, real, row = text_of(ends, rows, counts, tl.program_id(2), longest)
    if length > FEW:
        return
    head = tl.program_id(1)
    p = tl.program_id(0) * P_BLOCK + tl.arange(0, P_BLOCK)
    n = tl.arange(0, N_BLOCK)
    p_in, n_in = p < P, n < N
    S, place, valid = _initial_state(before, before_row, row, head, p, n, P, N)
    bias, A, skip = _scalars(dt_bias, A_log, D, head)
    of_group = H * P + head // (H // G) * N
    for t in range(length):
        at = begin + t
        dt = _step_size(tl.load(raw_dt + at * dt_step + head).to(tl.float32) + bias, least, most)
        dt = tl.where(t < real, dt, 0.0)
        from_ = mixed + at * mixed_step
        x = tl.load(from_ + head * P + p, mask=p_in, other=0.0).to(tl.float32)
        b = tl.load(from_ + of_group + n, mask=n_in, other=0.0).to(tl.float32)
        c = tl.load(from_ + of_group + G * N + n, mask=n_in, other=0.0).to(tl.float32)
        S = S * tl.exp(dt * A) + (dt * x)[:, None] * b[None, :]
        out = tl.sum(S * c[None, :], axis=1) + skip * x
        tl.store(y + at * (H * P) + head * P + p, out, mask=p_in)
        if tl.program_id(0) == 0:
            tl.store(steps + at * H + head, dt)
    if next_state is not None:
        tl.store(next_state + row * kept_row + place, S, mask=valid)


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    mixed,
    mixed_step,
    raw_dt,
    dt_step,
    dt_bias,
    A_log,
    D,
    before,
    before_row,
    next_state,
    kept_row,
    y,
    steps,
    ends,
    rows,
    counts,
    longest,
    least,
    most,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    N_BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    P_BLOCK: tl.constexpr,
    L: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    begin, length, real, row = text_of(ends, rows, counts, tl.program_id(2), longest)
    if length <= FEW:
        return
    head = tl.program_id(1)
    p = tl.program_id(0) * P_BLOCK + tl.arange(0, P_BLOCK)
    n = tl.arange(0, N_BLOCK)
    i = tl.arange(0, L)
    p_in, n_in = p < P, n < N
    S, place, valid = _initial_state(before, before_row, row, head, p, n, P, N)
    bias, A, skip = _scalars(dt_bias, A_log, D, head)
    of_group = H * P + head // (H // G) * N
    kinds: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    for first in range(0, length, L):
        t = first + i
        inside = t < length
        at = begin + t
        dt = tl.load(raw_dt + at * dt_step + head, mask=inside, other=0.0).to(tl.float32)
        dt = tl.where(t < real, _step_size(dt + bias, least, most), 0.0)
        from_ = mixed + at[:, None] * mixed_step
        some = inside[:, None] & n_in[None, :]
        x = tl.load(
            from_ + (head * P + p)[None, :], mask=inside[:, None] & p_in[None, :], other=0.0
        )
        b = tl.load(from_ + (of_group + n)[None, :], mask=some, other=0.0).to(kinds)
        c = tl.load(from_ + (of_group + G * N + n)[None, :], mask=some, other=0.0).to(kinds)
        # A difference of two running sums cancels: among tokens behind one that forgets all, it
        # would be rounded as that one's is. What is below -200 is nothing anyway.
        fades = dt * A
        fades = tl.where(fades < -200.0, -200.0, fades).to(tl.float64)
        so_far = tl.cumsum(fades, 0)
        whole = tl.sum(fades, 0)
        between = (so_far[:, None] - so_far[None, :]).to(tl.float32)
        decay = tl.exp(tl.where(i[:, None] >= i[None, :], between, float("-inf")))
        met = tl.dot(c, tl.trans(b), input_precision=PRECISION) * decay * dt[None, :]
        wide = x.to(tl.float32)
        out = tl.dot(c, tl.trans(S).to(kinds), input_precision=PRECISION)
        out *= tl.exp(so_far.to(tl.float32))[:, None]
        out = tl.dot(met.to(kinds), x.to(kinds), out, input_precision=PRECISION) + skip * wide
        tl.store(
            y + at[:, None] * (H * P) + (head * P + p)[None, :],
            out,
            mask=inside[:, None] & p_in[None, :],
        )
        if tl.program_id(0) == 0:
            tl.store(steps + at * H + head, dt, mask=inside)
        left = tl.exp((whole - so_far).to(tl.float32)) * dt
        taken = tl.trans(wide * left[:, None]).to(kinds)
        S = tl.dot(taken, b, S * tl.exp(whole.to(tl.float32)), input_precision=PRECISION)
    if next_state is not None:
        tl.store(next_state + row * kept_row + place, S, mask=valid)
