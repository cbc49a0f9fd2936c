"""Attention in bfloat16, without the matrix of scores."""

import torch
from torch import Tensor

from quintet.kernels.native import POINTER, REAL, applies, entry, pointers

__all__ = ["COLUMNS", "attend", "slots", "strides"]

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
    B, H, T, _ = q[0].shape
    _, K, S, Dv = v.shape
    if Dv % COLUMNS or any(x.shape[-1] % 2 for x in q) or not applies(*q, *k, v):
        return None
    if any(x.dtype != torch.bfloat16 or x.stride(-1) != 1 for x in (*q, *k, v)):
        return None
    function = entry("quintet_attention_bf16", POINTER, REAL)
    if function is None:
        return None
    out = v.new_empty(B, T, H, Dv).transpose(1, 2)
    starts = slots(start, B)
    one, two = len(q) == 1, (q[-1], k[-1])
    fields = [B, T, S, K, H // K, q[0].shape[-1], 0 if one else two[0].shape[-1], Dv, window or 0]
    tensors = (q[0], two[0], k[0], two[1], v, out)
    fields += [x.data_ptr() for x in tensors]
    for x in tensors:
        fields += strides(x)
    function(pointers([*fields, starts.data_ptr()]), scale)
    return out


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return how far apart rows, tokens and heads of (B, H, T, D) are; 0 for a head of all."""
    row, head, token, _ = x.stride()
    return row, token, head if x.shape[1] > 1 else 0


def slots(start: int | Tensor, B: int) -> Tensor:
    """Return the first slot of each of B rows."""
    if isinstance(start, int):
        return torch.full((B,), start, dtype=torch.long, device="cpu")
    return start.to(torch.long).contiguous()
