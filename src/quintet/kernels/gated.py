"""Gated MLPs of few tokens, one for all or experts a token chose: read once, in one pass."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quintet.kernels.linear import GROUP, Matrix, kernel_name
from quintet.kernels.native import POINTER, applies, entry, pointers

__all__ = ["gated", "stacked"]

# Beyond so many tokens, torch's products are the faster ones (docs/lab-notes.md).
MOST_TOKENS: Mapping[str, int] = MappingProxyType(
    {"bf16": 24, "f32": 24, "int8_bf16": 12, "int8_f32": 12, "int4_bf16": 12, "int4_f32": 12}
)


def gated(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    indices: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor | None:
    """Return Σ share · down(silu(gate x) · up x) over a token's experts; None if it cannot.

    Shapes: x (..., C); gate and up (F, C), down (C, F), each as in `Matrix` and without a bias.
    With `indices` (N, A) and `shares` (N, A), x is (N, C) and weights are (E, ...). Indices have to
    be all from 0 to E - 1.
    """
    dtype = x.dtype
    kind = gate.weight.dtype
    name = kernel_name(kind, dtype)
    C = x.shape[-1]
    N = x.numel() // C if C else 0
    # Asked before the library is: a compiler that traces this must not look into it.
    if not 0 < N <= MOST_TOKENS.get(name, 0) or not applies(x):
        return None
    function = entry(f"quintet_gated_{name}", POINTER)
    if function is None:
        return None
    E, A = 1, 1
    routed = indices is not None
    F = gate.weight.shape[-2]
    fields: list[int] = []
    for matrix, O, I in ((gate, F, C), (up, F, C), (down, C, F)):
        stack = stacked(matrix, kind, dtype, O, I, routed=routed)
        if stack is None:
            return None
        fields += stack
    x = x if x.is_contiguous() else x.contiguous()
    y = torch.empty_like(x)
    chosen = 0, 0
    if indices is not None and shares is not None:
        E, A = gate.weight.shape[0], indices.shape[1]
        if not applies(indices, shares) or not A or not indices.shape == shares.shape == (N, A):
            return None
        indices, shares = (
            indices.to(torch.int64).contiguous(),
            shares.to(torch.float32).contiguous(),
        )
        chosen = indices.data_ptr(), shares.data_ptr()
    fields += (E, C, F, x.data_ptr(), y.data_ptr(), *chosen, N, A, 0)
    call = pointers(fields)
    function(call)
    refused = call[-1]
    return None if refused else y


def stacked(
    matrix: Matrix, kind: torch.dtype, dtype: torch.dtype, O: int, I: int, *, routed: bool = True
) -> tuple[int, ...] | None:
    """Return address, scales, steps between experts in bytes, and the rows' stride; or None.

    Args:
        routed: whether there is one matrix an expert, (E, O, I), and not one for all.
    """
    weight, scale, bias = matrix
    if weight.dtype != kind or weight.ndim != 2 + routed or bias is not None or not applies(weight):
        return None
    groups = -(-I // GROUP)
    columns = groups * GROUP // 2 if kind == torch.uint8 else I
    if weight.shape[-2:] != (O, columns) or weight.stride(-1) != 1:
        return None
    step = weight.stride(0) * weight.element_size() if routed else 0
    if scale is None:
        return None if kind != dtype else (weight.data_ptr(), 0, step, 0, weight.stride(-2))
    stored = ((O,), torch.float32) if kind == torch.int8 else ((O, groups), torch.bfloat16)
    if (tuple(scale.shape[routed:]), scale.dtype) != stored or not applies(scale):
        return None
    packed = weight.stride(-2) == columns and scale.stride(-1) == 1
    if not packed or (kind == torch.uint8 and scale.stride(-2) != groups):
        return None
    scale_step = scale.stride(0) * scale.element_size() if routed else 0
    return weight.data_ptr(), scale.data_ptr(), step, scale_step, columns
