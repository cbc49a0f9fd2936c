"""Causal attention with gradients over packed texts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quintet.kernels.calls import Call, begin

# Numbers of a head are computed this many at a time.
LANES = 16
SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


def attend_texts(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
) -> tuple[Tensor, Tensor] | None:
    """Return causal softmax(q·kᵀ·scale)·v within each text, and log-sums (M, H).

    Shapes: q (M, H, D), k (M, K, D), v (M, K, V), the tokens of all texts; `lengths` sum to M.
    """
    call = _begun(q, k, v, lengths, scale)
    if call is None:
        return None
    out = call.output(q, *q.shape[:2], v.shape[-1])
    logs = call.output(q, *q.shape[:2], dtype=torch.float32)
    return (out, logs) if call.run(f"causal_{SUFFIX[q.dtype]}") else None


def attend_texts_gradient(
    grad: Tensor,
    out: Tensor,
    logs: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients of q, k and v; arguments as `attend_texts`."""
    call = _begun(q, k, v, lengths, scale)
    if call is None:
        return None
    call.packed(out, q.dtype, *q.shape[:2], v.shape[-1])
    call.copied(grad, q.dtype, *q.shape[:2], v.shape[-1])
    call.packed(logs, torch.float32, *q.shape[:2])
    for_q, for_k, for_v = (call.output(x, *x.shape) for x in (q, k, v))
    return (for_q, for_k, for_v) if call.run(f"causal_back_{SUFFIX[q.dtype]}") else None


def _begun(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Call | None:
    call = begin()
    if call is None or q.dtype not in SUFFIX or any(x.ndim != 3 for x in (q, k, v)):
        return None
    (M, H, D), K, V = q.shape, k.shape[1], v.shape[-1]
    if not q.numel() or not K or H % K or D % LANES or V % LANES:
        return None
    call.integers(M, len(lengths), H, K, D, V)
    call.real(scale)
    call.packed(torch.tensor(lengths, dtype=torch.int64, device="cpu"), torch.int64, len(lengths))
    call.packed(q, q.dtype, M, H, D)
    call.packed(k, q.dtype, M, K, D)
    call.packed(v, q.dtype, M, K, V)
    return call
