"""What becomes of logits before a token is chosen."""

import torch
from torch import Tensor

from quintet.kernels.native import INTEGER, POINTER, REAL, applies, entry

__all__ = ["penalise_repetition"]


def penalise_repetition(
    logits: Tensor, ids: Tensor, kept: Tensor | None, penalty: float
) -> Tensor | None:
    """Return what `ops.sampling.penalise_repetition` does; None where the kernel does not apply."""
    if logits.dtype != torch.float32 or ids.dtype != torch.int64 or not applies(logits, ids):
        return None
    if not logits.is_contiguous() or (ids.numel() and ids.stride(1) != 1):
        return None
    if kept is not None and not (kept.is_contiguous() and kept.dtype == torch.bool):
        return None
    function = entry("quintet_penalise_repetition", *(POINTER,) * 4, *(INTEGER,) * 4, REAL)
    if function is None:
        return None
    made = torch.empty_like(logits)
    (B, V), T = logits.shape, ids.shape[1]
    mask = 0 if kept is None else kept.data_ptr()
    pointers = logits.data_ptr(), ids.data_ptr(), mask, made.data_ptr()
    function(*pointers, B, V, T, ids.stride(0), penalty)
    return made
