"""Linear maps of few rows by weights in fewer bits, which are widened in registers.

What bounds these is how fast weights are read. A few vectors find them in the cache after the first
(`vectors.py`); more of them go together on tensor cores (`tiles.py`). A prompt has so many that to
widen a weight once costs less: that is the definition's way.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from quintet.kernels.linear import batch_invariant
from quintet.kernels.matrix import Matrix
from quintet.triton.launching import cdiv, launch, power_of_two, takes
from quintet.triton.tiles import times_rows
from quintet.triton.vectors import map_vectors
from quintet.triton.weights import KernelWeight, kernel_weight

# So many rows go one by one, and so many at the most together.
FEW, MOST = 2, 64
# Outputs of a tile: few, so that the smallest matrices of a layer still occupy a GPU.
OUTPUTS = 32


def linears(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor] | None:
    """Return x·Wᵀ + b for each of `maps`, weights of integers or e4m3; None if it cannot.

    Shapes: x (..., I), returns (..., O) for each.
    """
    given = [x, *(t for one in maps for t in one[:4] if t is not None)]
    if not x.ndim or not x.numel() or not takes(*given):
        return None
    rows = x.reshape(-1, x.shape[-1])
    fits = len(rows) <= MOST and rows.stride(1) == 1
    found = [_found(one, rows) for one in maps] if fits else []
    outputs = []
    for matrix, weight in zip(maps, found, strict=False):
        if weight is None:
            return None
        y = rows.new_empty(len(rows), len(matrix.weight))
        if len(rows) <= FEW and not batch_invariant():
            map_vectors(rows, weight, matrix.bias, y)
        else:
            _together(rows, weight, matrix.bias, y)
        outputs.append(y.view(*x.shape[:-1], -1))
    return outputs if found else None


def _found(matrix: Matrix, rows: Tensor) -> KernelWeight | None:
    weight, bias = matrix.weight, matrix.bias
    if matrix.scale is None or weight.ndim != 2:
        return None
    O = len(weight)
    if bias is not None and (bias.shape != (O,) or not bias.is_contiguous()):
        return None
    return kernel_weight(matrix, O, rows.shape[1], rows.dtype) if O else None


def _together(x: Tensor, weight: KernelWeight, bias: Tensor | None, output: Tensor) -> None:
    (M, I), O = x.shape, output.shape[1]
    # Of one shape whoever shares the batch, where that may not matter.
    rows = 32 if batch_invariant() else min(max(power_of_two(M), 16), 64)
    launch(
        _map_rows,
        (cdiv(O, OUTPUTS), cdiv(M, rows)),
        x,
        x.stride(0),
        *weight.arguments,
        bias,
        output,
        I,
        O,
        M,
        BIAS=bias is not None,
        BLOCK=64,
        ROWS=rows,
        OUTPUTS=OUTPUTS,
        **weight.constants,
    )


@triton.jit
def _map_rows(  # type: ignore[no-untyped-def]
    x,
    x_step,
    weight,
    scale,
    offset,
    expert_step,
    row_step,
    expert_scales,
    scale_step,
    bias,
    output,
    K,
    O,
    M,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    NUMBERS: tl.constexpr,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside, valid = o < O, m < M
    wide = m.to(tl.int64)
    y = times_rows(
        x, wide * x_step, valid, weight, scale, offset, row_step, scale_step, o, inside, 0, K, K,
        BLOCK, NUMBERS, GROUP, HEIGHT, WHOLE, OFFSET,
    )  # fmt: skip
    if BIAS:
        y += tl.load(bias + o, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = wide[None, :] * O + o[:, None]
    tl.store(output + at, y.to(output.dtype.element_ty), mask=inside[:, None] & valid[None, :])
