"""Attention for few new tokens per row, bound by reading keys and values."""

import torch
from torch import Tensor

from quintet.kernels.calls import begin, firsts
from quintet.kernels.linear import STEP_TOKENS

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
LANES = 16


def decode(
    q: Tensor, k: Tensor, v: Tensor, *, start: int | Tensor, window: int | None, scale: float
) -> Tensor | None:
    """Return softmax(q·kᵀ·scale)·v, (B, H, T, D); None where the kernel does not apply.

    Query i of a row is in slot `start` + i and sees the keys up to it, at most the last `window`.

    Shapes: q (B, H, T, D), k and v (B, K, S, D), start (B).
    """
    call = begin()
    suffix = SUFFIX.get(q.dtype)
    if call is None or suffix is None or q.ndim != 4 or k.ndim != 4:
        return None
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if not 0 < T <= STEP_TOKENS or D % LANES or not B or not K or H % K:
        return None
    slots = firsts(start, B)
    # A query behind the last key has none of its own.
    if slots is None or not 0 <= min(slots) <= max(slots) <= S - T:
        return None
    call.integers(B, T, H, K, S, D, window or 0)
    call.real(scale)
    call.rows(q, q.dtype, B, H, T, D)
    call.rows(k, q.dtype, B, K, S, D)
    call.rows(v, q.dtype, B, K, S, D)
    out = call.output(q, B, T, H, D)
    call.integers(*slots)
    return out.transpose(1, 2) if call.run(f"decode_{suffix}") else None
