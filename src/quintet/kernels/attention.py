"""Attention in bfloat16 without materialised scores."""

import torch
from torch import Tensor

from quintet.kernels.calls import begin, firsts

# How many columns of values the kernel takes at once, where vectors are widest.
COLUMNS = 32


def attend(
    q: tuple[Tensor, ...],
    k: tuple[Tensor, ...],
    v: Tensor,
    *,
    start: int | Tensor,
    window: int | None,
    scale: float,
) -> Tensor | None:
    """Return softmax(q·kᵀ·scale)·v, (B, H, T, Dv); None where the kernel does not apply.

    Query i of a row sees the keys up to slot `start` + i, at most the last `window` of them.
    Queries and keys come in one part or two, as if joined along the last axis; a part of the keys
    with one head is shared by all.

    Shapes: q (B, H, T, D) each, k (B, K or 1, S, D) each, v (B, K, S, Dv), start (B).
    """
    call = begin()
    if call is None or v.dtype != torch.bfloat16 or any(x.ndim != 4 for x in (*q, *k, v)):
        return None
    B, H, T, _ = q[0].shape
    _, K, S, Dv = v.shape
    slots = firsts(start, B)
    if not 1 <= len(q) == len(k) <= 2 or not K or H % K or Dv % COLUMNS or slots is None:
        return None
    call.integers(B, H, K, T, S, Dv, window or 0)
    call.real(scale)
    for of_q, of_k in zip(q, k, strict=True):
        D, heads = of_q.shape[3], of_k.shape[1]
        if D % 2 or heads not in (1, K):
            return None
        call.integers(D, heads)
        call.rows(of_q, v.dtype, B, H, T, D)
        call.rows(of_k, v.dtype, B, heads, S, D)
    if len(q) == 1:
        call.integers(*[0] * 12)
    call.rows(v, v.dtype, B, K, S, Dv)
    out = call.output(v, B, T, H, Dv)
    call.integers(*slots)
    return out.transpose(1, 2) if call.run("attention_bf16") else None
