"""Gated MLPs and experts for few tokens, in one pass over the weights."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from quintet.kernels.calls import begin
from quintet.kernels.linear import STEP_TOKENS, SUFFIX, batch_invariant, kernel_name
from quintet.kernels.matrix import Kind, Matrix, common_kind, write_stack

# Beyond so many tokens, other products are the faster ones (docs/lab-notes.md).
MOST_TOKENS: Mapping[str, int] = MappingProxyType(
    {"bf16": STEP_TOKENS, "f32": 24}
    | {f"{kind}{dtype}": STEP_TOKENS for kind in Kind if kind for dtype in SUFFIX.values()}
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
    dtype, kind = x.dtype, common_kind((gate, up, down))
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
        write_stack(call, matrix, kind, dtype, O, I, E)
    call.integers(E or 1, C, F, N, A)
    call.copied(x, dtype, *x.shape)
    y = call.output(x, *x.shape)
    if indices is None or shares is None:
        call.integers(0, 0, 0, 0)
    else:
        call.chosen(indices, shares, N, A)
    return y if call.run(f"gated_{name}") else None
