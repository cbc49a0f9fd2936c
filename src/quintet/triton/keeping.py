"""Rotation of queries and keys, norm of latents, and the write of what is kept, in one launch.

A program has one vector of one token: the query of a head, which it rotates; the key of a head,
which it rotates and writes to the token's slot; or what is kept beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quintet.triton.finding import sequence_of
from quintet.triton.launching import launch, power_of_two, takes
from quintet.triton.norm import LONGEST
from quintet.triton.pages import Pages

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def rotate_and_keep(
    q: Tensor,
    k: Tensor,
    other: Tensor,
    cos: Tensor,
    sin: Tensor,
    memory: tuple[Tensor, Tensor],
    pages: Pages,
    *,
    norm: tuple[Tensor, float] | None,
    interleaved: bool,
) -> Tensor | None:
    """Compute `ops.keeping.rotate_and_keep`, (N, H, D); write the memory."""
    weight, eps = norm or (None, 0.0)
    given = [q, k, other, cos, sin, *memory, pages.starts, pages.ends]
    given += [x for x in (weight, pages.table) if x is not None]
    if not _fits(q, k, other, (cos, sin), memory, pages, weight) or not takes(*given):
        return None
    (N, H, D), K, E = q.shape, k.shape[1], other.shape[2]
    table, n, page = pages.table, len(pages.starts), memory[0].shape[2]
    assert table is not None
    E_BLOCK = power_of_two(E)
    rotated = q.new_empty(N, H, D)
    launch(
        _rotate_and_keep,
        (N, H + 2 * K),
        q,
        *q.stride()[:2],
        k,
        *k.stride()[:2],
        other,
        *other.stride()[:2],
        cos,
        sin,
        cos.stride(0),
        weight,
        rotated,
        memory[0],
        *memory[0].stride()[:3],
        memory[1],
        *memory[1].stride()[:3],
        table,
        table.stride(0),
        pages.starts,
        pages.ends,
        n,
        page,
        table.shape[1],
        eps,
        H=H,
        K=K,
        HALF=D // 2,
        HALF_BLOCK=power_of_two(D // 2),
        E=E,
        E_BLOCK=E_BLOCK,
        # Where all have as many tokens, no program has to look for its sequence.
        EACH=pages.most if n * pages.most == N else 0,
        INTERLEAVED=interleaved,
        num_warps=min(max(max(E_BLOCK, D) // 256, 1), 16),
    )
    return rotated


def _fits(
    q: Tensor,
    k: Tensor,
    other: Tensor,
    angles: tuple[Tensor, Tensor],
    memory: tuple[Tensor, Tensor],
    pages: Pages,
    weight: Tensor | None,
) -> bool:
    """Return whether shapes, steps and dtypes suit the kernel."""
    vectors, dtype, table = (q, k, other), q.dtype, pages.table
    if table is None or dtype not in FLOATS or any(x.ndim != 3 for x in vectors):
        return False
    (N, H, D), K, E, n = q.shape, k.shape[1], other.shape[2], len(pages.starts)
    P, _, page, _ = memory[0].shape
    return (
        bool(N and H and K and n and P and page and 0 < E <= LONGEST)
        and D > 0
        and D % 2 == 0
        and k.shape == (N, K, D)
        and other.shape == (N, K, E)
        and all(x.shape == (N, D) and x.stride(1) == 1 for x in angles)
        and angles[0].stride(0) == angles[1].stride(0)
        and memory[0].shape == (P, K, page, D)
        and memory[1].shape == (P, K, page, E)
        and all(x.dtype == dtype and x.stride(-1) == 1 for x in (*vectors, *angles, *memory))
        and (
            weight is None
            or (weight.shape == (E,) and weight.is_contiguous() and weight.dtype == dtype)
        )
        and table.dtype == torch.int32
        and table.ndim == 2
        and len(table) == n
        and table.stride(1) == 1
        and pages.ends.shape == (n + 1,)
        and all(x.dtype == torch.int32 and x.is_contiguous() for x in (pages.starts, pages.ends))
    )


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    token, table, table_step, starts, ends, n, page, J, EACH: tl.constexpr
):
    """Return the page of a token, below 0 where it is nowhere, and its place there."""
    sequence = token // EACH if EACH else sequence_of(ends, n, token)
    own = tl.minimum(sequence, n - 1)
    slot = tl.load(starts + own) + token - tl.load(ends + own)
    column = slot // page
    number = tl.load(table + own * table_step + tl.minimum(column, J - 1))
    number = tl.where((sequence < n) & (column < J), number, -1)
    return number.to(tl.int64), slot % page


@triton.jit
def _rotate_and_keep(  # type: ignore[no-untyped-def]
    q,
    q_token,
    q_head,
    k,
    k_token,
    k_head,
    other,
    other_token,
    other_head,
    cos,
    sin,
    angle_token,
    weight,
    rotated,
    keys,
    keys_page,
    keys_head,
    keys_slot,
    others,
    others_page,
    others_head,
    others_slot,
    table,
    table_step,
    starts,
    ends,
    n,
    page,
    J,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0)
    at = token.to(tl.int64)
    part = tl.program_id(1)
    if part < H + K:
        i = tl.arange(0, HALF_BLOCK)
        inside = i < HALF
        first = q + at * q_token + part * q_head
        into = rotated + (at * H + part) * (2 * HALF)
        if part >= H:
            number, place = _place(token, table, table_step, starts, ends, n, page, J, EACH)
            inside = i < tl.where(number >= 0, HALF, 0)
            first = k + at * k_token + (part - H) * k_head
            into = keys + number * keys_page + (part - H) * keys_head + place * keys_slot
        one = i
        two = i + HALF
        if INTERLEAVED:
            one = 2 * i
            two = 2 * i + 1
        left = tl.load(first + one, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(first + two, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + at * angle_token + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + at * angle_token + i, mask=inside, other=0.0).to(tl.float32)
        kinds = rotated.dtype.element_ty
        tl.store(into + i, (left * c - right * s).to(kinds), mask=inside)
        tl.store(into + HALF + i, (right * c + left * s).to(kinds), mask=inside)
    else:
        head = part - H - K
        e = tl.arange(0, E_BLOCK)
        number, place = _place(token, table, table_step, starts, ends, n, page, J, EACH)
        x = tl.load(other + at * other_token + head * other_head + e, mask=e < E, other=0.0)
        if weight is not None:
            wide = x.to(tl.float32)
            scaled = wide * tl.rsqrt(tl.sum(wide * wide) / E + eps)
            # Rounded before the weight, as the definition is.
            w = tl.load(weight + e, mask=e < E, other=0.0).to(tl.float32)
            x = (scaled.to(x.dtype).to(tl.float32) * w).to(x.dtype)
        slot = others + number * others_page + head * others_head + place * others_slot
        tl.store(slot + e, x, mask=e < tl.where(number >= 0, E, 0))
