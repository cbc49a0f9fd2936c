"""Attention of many queries in bfloat16, without the matrix of scores."""

import torch
from torch import Tensor

from quintet.kernels.native import POINTER, REAL, applies, entry, native, pointers

__all__ = ["attend"]

LANES = 16


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
    B, H, T, _ = q[0].shape
    _, K, S, Dv = v.shape
    if T == 1 or Dv % LANES or not applies(*q, *k, v) or native().level != "avx512_bf16":
        return None
    if any(x.dtype != torch.bfloat16 or x.stride(-1) != 1 for x in (*q, *k, v)):
        return None
    function = entry("quintet_attention", POINTER, REAL)
    if function is None:
        return None
    starts = start if isinstance(start, Tensor) else torch.full((B,), start)
    starts = starts.to(torch.long).contiguous()
    out = v.new_empty(B, T, H, Dv).transpose(1, 2)
    fields = [*_parts(q), *_parts(k), *_vectors(v), out.data_ptr(), *out.stride()[:3]]
    fields += (starts.data_ptr(), B, H, K, T, S, window or 0)
    function(pointers(fields), scale)
    return out


def _parts(parts: tuple[Tensor, ...]) -> list[int]:
    fields = [field for part in parts for field in _vectors(part)]
    return fields + [0] * (10 - len(fields))


def _vectors(x: Tensor) -> tuple[int, ...]:
    row, head, token, _ = x.stride()
    return x.data_ptr(), row, head if x.shape[1] > 1 else 0, token, x.shape[-1]
