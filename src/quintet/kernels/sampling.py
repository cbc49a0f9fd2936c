"""Logits processing before a token is chosen."""

import torch
from torch import Tensor

from quintet.kernels.calls import begin


def penalise_repetition(
    logits: Tensor, ids: Tensor, kept: Tensor | None, penalty: float
) -> Tensor | None:
    """Return `ops.sampling.penalise_repetition`, or None if the kernel does not apply."""
    call = begin()
    if call is None or logits.ndim != 2 or ids.ndim != 2:
        return None
    (B, V), T = logits.shape, ids.shape[1]
    call.integers(B, V, T)
    call.real(penalty)
    call.packed(logits, torch.float32, B, V)
    call.rows(ids, torch.int64, B, T)
    call.packed(kept, torch.bool, B, T)
    made = call.output(logits, B, V)
    return made if call.run("penalise_repetition") else None
