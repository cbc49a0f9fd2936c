"""Gated MLPs of few tokens, one for all or experts a token chose: read once, in one pass."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from quintet.kernels.calls import Call, begin
from quintet.kernels.linear import GROUP, STEP_TOKENS, Matrix, batch_invariant, kernel_name

__all__ = ["gated", "stacked"]

# Beyond so many tokens, other products are the faster ones (docs/lab-notes.md).
MOST_TOKENS: Mapping[str, int] = MappingProxyType(
    {"bf16": STEP_TOKENS, "f32": 24}
    | dict.fromkeys(("int8_bf16", "int8_f32", "int4_bf16", "int4_f32"), STEP_TOKENS)
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
    call = begin()
    dtype, kind = x.dtype, gate.weight.dtype
    name = kernel_name(kind, dtype)
    C = x.shape[-1] if x.ndim else 0
    N = x.numel() // C if C else 0
    most = MOST_TOKENS.get(name, 0)
    if name == "bf16" and batch_invariant():
        most *= 2
    if call is None or not 0 < N <= most or gate.weight.ndim < 2:
        return None
    E, A = None, 1
    F = gate.weight.shape[-2]
    if indices is not None:
        if indices.ndim != 2 or x.ndim != 2:
            return None
        E, A = len(gate.weight), indices.shape[1]
    for matrix, O, I in ((gate, F, C), (up, F, C), (down, C, F)):
        stacked(call, matrix, kind, dtype, O, I, E)
    call.integers(E or 1, C, F, N, A)
    call.copied(x, dtype, *x.shape)
    y = call.output(x, *x.shape)
    if indices is None or shares is None:
        call.integers(0, 0, 0, 0)
    else:
        call.chosen(indices, shares, N, A)
    return y if call.run(f"gated_{name}") else None


def stacked(
    call: Call,
    matrix: Matrix,
    kind: torch.dtype,
    dtype: torch.dtype,
    O: int,
    I: int,
    E: int | None,
) -> None:
    """Write E matrices (E, O, I), or the one (O, I) there is, for vectors (..., I) of a dtype.

    Args:
        kind: the dtype in which weights are stored.
    """
    weight, scale, bias, offset, iq4 = matrix
    call.fit &= bias is None and (scale is None) == (kind == dtype)
    call.fit &= offset is None and not iq4
    if scale is None:
        call.rows(weight, kind, *(() if E is None else (E,)), O, I, axes=2)
        call.integers(0, 0, 0)
        return
    groups = -(-I // GROUP)
    columns = I if kind == torch.int8 else groups * GROUP // 2
    stored, *scales = (torch.float32, O) if kind == torch.int8 else (torch.bfloat16, O, groups)
    if E is None:
        call.packed(weight, kind, O, columns)
        call.integers(0, columns)
        call.packed(scale, stored, *scales)
        call.integers(0)
    else:
        call.stack(weight, kind, E, O, columns)
        call.integers(columns)
        call.stack(scale, stored, E, *scales)
