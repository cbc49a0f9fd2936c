"""The kernels of attention over pages.

A program has some rows of the product of queries and keys: a row is a token and one of the G heads
that share a key head, so that keys are read once for all of them. It passes over the keys that its
rows see, with a running softmax (arXiv:2205.14135). Where that makes too few programs for a GPU,
the keys of each are divided among several, whose results are joined by a second kernel.
"""

import triton
import triton.language as tl


@triton.jit
def vectors(  # type: ignore[no-untyped-def]
    memory, scales, at, scale_at, inside, D: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    """Load vectors (S, BLOCK) as numbers, of bytes where they are coded (ops/vector_codes.py)."""
    d = tl.arange(0, BLOCK)[None, :]
    valid = inside[:, None] & (d < D)
    first = memory + at[:, None]
    if BITS == 0:
        numbers_out = tl.load(first + d, mask=valid, other=0.0)
    else:
        if BITS == 8:
            numbers = tl.load(first + d, mask=valid, other=0).to(tl.int32)
        elif BITS == 4:
            half: tl.constexpr = D // 2
            byte = tl.load(first + d % half, mask=valid, other=0).to(tl.int32)
            numbers = (byte >> tl.where(d < half, 0, 4)) & 15
        else:
            quarter: tl.constexpr = D // 4
            low = valid & (d < 3 * quarter)
            numbers = tl.load(first + d, mask=low, other=0).to(tl.int32) & 63
            for i in tl.static_range(3):
                byte = tl.load(
                    first + i * quarter + d % quarter, mask=valid & (d >= 3 * quarter), other=0
                )
                numbers = numbers | ((byte.to(tl.int32) >> 6) << (2 * i))
        scale = tl.load(scales + scale_at, mask=inside, other=0.0).to(tl.float32)
        numbers_out = (numbers - (1 << (BITS - 1))).to(tl.float32) * scale[:, None]
        numbers_out = tl.where(valid, numbers_out, 0.0)
    return numbers_out


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    q,
    q2,
    k,
    k2,
    v,
    k_scales,
    k2_scales,
    v_scales,
    table,
    starts,
    ends,
    out,
    sums,
    scale,
    n,
    N,
    page,
    room,
    table_step,
    q_token,
    q_head,
    q2_token,
    q2_head,
    k_page,
    k_head,
    k_slot,
    k2_page,
    k2_head,
    k2_slot,
    v_page,
    v_head,
    v_slot,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    D2: tl.constexpr,
    D2_BLOCK: tl.constexpr,
    DV: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    EACH: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    PAGED: tl.constexpr,
    BITS: tl.constexpr,
):
    """Attend with M rows to the keys of one head that are this program's."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if EACH:
        sequence = tile // EACH
        own = tile % EACH
    else:
        # Of what begins at token e, tiles begin at e·G/M rounded down, and one more each.
        low = tile * 0
        high = low + n
        while low < high:
            middle = (low + high) // 2
            if tl.load(ends + middle) * G // M + middle <= tile:
                low = middle + 1
            else:
                high = middle
        sequence = low - 1
        own = tile - (tl.load(ends + sequence) * G // M + sequence)
    begin = tl.load(ends + sequence)
    T = tl.load(ends + sequence + 1) - begin
    if own * M >= T * G:
        return
    start = tl.load(starts + sequence)
    rows = own * M + tl.arange(0, M)
    real = rows < T * G
    token = rows // G
    h = head * G + rows % G
    slot = start + token
    # The keys that any of the rows sees, and those of them that are this program's.
    least = start + own * M // G
    end = start + tl.minimum((own * M + M - 1) // G, T - 1) + 1
    first = 0
    if WINDOW:
        first = tl.maximum(least - WINDOW + 1, 0)
    number = begin * 0
    if table is not None:
        number = tl.load(table + sequence * table_step)
        end = tl.minimum(end, room)
        if not PAGED:
            end = tl.where(number < 0, first, end)
    per_split = tl.cdiv(tl.cdiv(end - first, S), SPLITS) * S
    first = first + split * per_split
    end = tl.minimum(end, first + per_split)
    # Of a row, a page is all there is; in a packed row, slots count from where a sequence begins.
    offset = begin if table is None else begin * 0
    base = number.to(tl.int64)
    kinds = q.dtype.element_ty

    d = tl.arange(0, D_BLOCK)
    at = (begin + token).to(tl.int64)
    queries = tl.load(
        q + (at * q_token + h * q_head)[:, None] + d[None, :],
        mask=real[:, None] & (d < D)[None, :],
        other=0.0,
    )
    if q2 is not None:
        d2 = tl.arange(0, D2_BLOCK)
        turned = tl.load(
            q2 + (at * q2_token + h * q2_head)[:, None] + d2[None, :],
            mask=real[:, None] & (d2 < D2)[None, :],
            other=0.0,
        )
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, DV_BLOCK), tl.float32)
    for s0 in range(first, end, S):
        s = s0 + tl.arange(0, S)
        inside = s < end
        if PAGED:
            page_number = tl.load(table + sequence * table_step + s // page, mask=inside, other=-1)
            inside = inside & (page_number >= 0)
            page_at = page_number.to(tl.int64)
            place = s % page
        else:
            page_at = base
            place = s + offset
        scale_at = (page_at * K + head) * page + place
        keys = vectors(
            k + head * k_head,
            k_scales,
            page_at * k_page + place * k_slot,
            scale_at,
            inside,
            D,
            D_BLOCK,
            BITS,
        ).to(kinds)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if q2 is not None:
            more = vectors(
                k2 + head * k2_head,
                k2_scales,
                page_at * k2_page + place * k2_slot,
                scale_at if K == 1 or BITS == 0 else page_at * page + place,
                inside,
                D2,
                D2_BLOCK,
                BITS,
            ).to(kinds)
            scores = tl.dot(turned, tl.trans(more), scores, input_precision="ieee")
        seen = inside[None, :] & (s[None, :] <= slot[:, None])
        if WINDOW:
            seen = seen & (s[None, :] > slot[:, None] - WINDOW)
        scores = tl.where(seen, scores * scale, float("-inf"))
        above = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet subtracts no infinity from another.
        finite = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp2(scores - finite[:, None])
        fades = tl.exp2(top - finite)
        total = total * fades + tl.sum(weights, 1)
        top = above
        if v is None:
            values = keys
        else:
            values = vectors(
                v + head * v_head,
                v_scales,
                page_at * v_page + place * v_slot,
                scale_at,
                inside,
                DV,
                DV_BLOCK,
                BITS,
            ).to(kinds)
        mixed = tl.dot(weights.to(kinds), values, mixed * fades[:, None], input_precision="ieee")
    some = tl.where(total > 0, total, 1.0)
    mixed = mixed / some[:, None]
    dv = tl.arange(0, DV_BLOCK)
    target = (split * N + at) * (K * G) + h
    written = real
    if SPLITS > 1:
        # What has seen nothing is not read.
        written = rows < tl.where(first < end, T * G, 0)
    tl.store(
        out + target[:, None] * DV + dv[None, :],
        mixed.to(out.dtype.element_ty),
        mask=written[:, None] & (dv < DV)[None, :],
    )
    if SPLITS > 1:
        tl.store(sums + target, top + tl.log2(some), mask=real)


@triton.jit
def join(  # type: ignore[no-untyped-def]
    parts,
    sums,
    out,
    rows,
    DV: tl.constexpr,
    DV_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Sum the programs' results of a row, by their part of the sum of its weights."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DV_BLOCK)
    top = float("-inf")
    total = 0.0
    mixed = tl.zeros((DV_BLOCK,), tl.float32)
    for split in range(SPLITS):
        at = split * rows + row
        one = tl.load(sums + at)
        above = tl.maximum(top, one)
        finite = tl.where(above == float("-inf"), 0.0, above)
        fades, share = tl.exp2(top - finite), tl.exp2(one - finite)
        # Who has seen nothing has written nothing else.
        some = d < tl.where(one > float("-inf"), DV, 0)
        part = tl.load(parts + at * DV + d, mask=some, other=0.0)
        mixed = mixed * fades + part * share
        total = total * fades + share
        top = above
    mixed = mixed / tl.where(total > 0, total, 1.0)
    tl.store(out + row * DV + d, mixed.to(out.dtype.element_ty), mask=d < DV)
