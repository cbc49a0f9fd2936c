"""Attention of one new token a row, bound by reading its keys and values."""

import ctypes

import torch
from torch import Tensor

from quintet.kernels.native import POINTER, REAL, applies, entry, pointers

__all__ = ["decode"]

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
LANES = 16


def decode(
    q: Tensor, k: Tensor, v: Tensor, *, start: int | Tensor, window: int | None, scale: float
) -> Tensor | None:
    """Return softmax(q·kᵀ·scale)·v, (B, H, 1, D); None where the kernel does not apply.

    A row's query is in slot `start` and sees the keys up to it, at most the last `window`.

    Shapes: q (B, H, 1, D), k and v (B, K, S, D), start (B).
    """
    suffix = SUFFIX.get(q.dtype)
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    if T != 1 or suffix is None or D % LANES or not B or not applies(q, k, v):
        return None
    if k.shape != v.shape or k.shape[3] != D or H % K:
        return None
    if any(x.dtype != q.dtype or x.stride(3) != 1 for x in (q, k, v)):
        return None
    function = entry(f"quintet_decode_{suffix}", POINTER, REAL)
    if function is None:
        return None
    ends = [start + 1] * B if isinstance(start, int) else (start + 1).tolist()
    assert max(ends) <= S, "a query behind the last key"
    lengths = pointers(ends)
    out = q.new_empty((B, 1, H, D))
    fields = [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *q.stride()[:2]]
    fields += (*k.stride()[:3], *v.stride()[:3], ctypes.addressof(lengths), B, H, K, D, window or 0)
    function(pointers(fields), scale)
    return out.transpose(1, 2)
