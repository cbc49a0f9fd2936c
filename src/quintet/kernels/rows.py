"""What is done row by row between the products: normalise, rotate, gate."""

import torch
from torch import Tensor

from quintet.kernels.native import INTEGER, POINTER, REAL, applies, entry, pointers

__all__ = ["rms_norm", "rotate", "silu_mul"]

SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """Return x / sqrt(mean(x²) + eps) · weight; x (..., C), weight (C)."""
    suffix = SUFFIX.get(x.dtype)
    if suffix is None or weight.dtype != x.dtype or not applies(x, weight) or not x.numel():
        return None
    function = entry(f"quintet_rms_norm_{suffix}", *(POINTER,) * 3, INTEGER, INTEGER, REAL)
    if function is None or weight.ndim != 1 or not weight.is_contiguous():
        return None
    x = x if x.is_contiguous() else x.contiguous()
    C = x.shape[-1]
    made = torch.empty_like(x)
    function(x.data_ptr(), weight.data_ptr(), made.data_ptr(), x.numel() // C, C, eps)
    return made


def rotate(
    parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor, *, neighbours: bool = False
) -> list[Tensor] | None:
    """Rotate the pairs (i, i + D/2) of each (B, H, T, D); cos and sin (B or 1, T, D).

    With `neighbours`, the pairs are (2i, 2i + 1), and come back as (i, i + D/2).
    """
    dtype = cos.dtype
    suffix = SUFFIX.get(dtype)
    if suffix is None or not applies(cos, sin, *parts) or not parts[0].numel():
        return None
    function = entry(f"quintet_rotate_{suffix}", POINTER, INTEGER, *(POINTER,) * 2, *(INTEGER,) * 5)
    B, _, T, D = parts[0].shape
    if function is None or D % 2 or not cos.is_contiguous() or not sin.is_contiguous():
        return None
    if cos.shape != sin.shape or cos.shape[0] not in (1, B) or cos.shape[1:] != (T, D):
        return None
    fields: list[int] = []
    made = []
    for x in parts:
        row, head, token, last = x.stride()
        if x.dtype != dtype or last != 1:
            return None
        y = x.new_empty((B, T, x.shape[1], D))
        made.append(y.transpose(1, 2))
        fields += (x.data_ptr(), y.data_ptr(), row, head, token, x.shape[1])
    angle_row = T * D if cos.shape[0] > 1 else 0
    angles = cos.data_ptr(), sin.data_ptr(), angle_row
    function(pointers(fields), len(parts), *angles, B, T, D, neighbours)
    return made


def silu_mul(gate: Tensor, up: Tensor) -> Tensor | None:
    """Return silu(gate) · up; both (..., F)."""
    suffix = SUFFIX.get(gate.dtype)
    if suffix is None or up.dtype != gate.dtype or not applies(gate, up) or not gate.numel():
        return None
    function = entry(f"quintet_silu_mul_{suffix}", *(POINTER,) * 3, *(INTEGER,) * 4)
    if function is None or gate.shape != up.shape or not gate.is_contiguous():
        return None
    up = up if up.is_contiguous() else up.contiguous()
    made = torch.empty_like(gate)
    F = gate.shape[-1]
    rows = gate.numel() // F
    function(gate.data_ptr(), up.data_ptr(), made.data_ptr(), rows, F, F, F)
    return made
