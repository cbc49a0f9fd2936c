"""Latent attention in the space of the latents, in bfloat16."""

import torch
from torch import Tensor

from quintet.kernels.attention import COLUMNS, slots, strides
from quintet.kernels.native import POINTER, REAL, applies, entry, pointers

__all__ = ["attend_latents"]


def attend_latents(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor,
    k_pe: Tensor,
    w_kv: Tensor,
    *,
    start: int | Tensor,
    scale: float,
) -> Tensor | None:
    """Return what `ops.mla.absorbed` does, (B, H, T, Dv); None where the kernel does not apply.

    Query i of a row sees the latents up to slot `start` + i, and reads no other. Shapes: q_nope
    (B, H, T, Dn), q_pe (B, H, T, Dr), c_kv (B, S, R), k_pe (B, S, Dr), w_kv (H, Dn + Dv, R), start
    (B).
    """
    B, H, T, Dn = q_nope.shape
    S, R = c_kv.shape[1:]
    Dr, Dv = q_pe.shape[-1], w_kv.shape[1] - Dn
    tensors = (q_nope, q_pe, c_kv, k_pe, w_kv)
    if Dn % 2 or Dr % 2 or R % COLUMNS or not w_kv.is_contiguous() or not applies(*tensors):
        return None
    if any(x.dtype != torch.bfloat16 or x.stride(-1) != 1 for x in tensors):
        return None
    function = entry("quintet_latent_bf16", POINTER, REAL)
    if function is None:
        return None
    out = q_nope.new_empty(B, T, H, Dv)
    space = q_nope.new_empty(2, B, T, H, R)
    starts = slots(start, B)
    fields = [B, T, S, H, Dn, Dr, Dv, R]
    fields += [x.data_ptr() for x in (*tensors, space, space[1], out)]
    for x in (q_nope, q_pe, c_kv[:, None], k_pe[:, None]):
        fields += strides(x)
    function(pointers([*fields, starts.data_ptr()]), scale)
    return out.transpose(1, 2)
