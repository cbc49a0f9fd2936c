"""Linear maps of few vectors, bound by how fast their weights are read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quintet.kernels.native import INTEGER, POINTER, applies, entry, pointers

__all__ = ["MOST_VECTORS", "linears"]

# Beyond this many vectors, torch's own matrix product is the faster one (docs/lab-notes.md).
MOST_VECTORS = {torch.bfloat16: 32, torch.float32: 32}
NAMES = {torch.bfloat16: "quintet_linear_bf16", torch.float32: "quintet_linear_f32"}


def linears(x: Tensor, maps: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor] | None:
    """Return x·Wᵀ + b for each of `maps`, in one pass; None where the kernel does not apply.

    Shapes: x (..., I); of each map, W (O, I) and b (O); returns (..., O) for each.
    """
    dtype = x.dtype
    if dtype not in NAMES or not applies(x):
        return None
    shape = x.shape
    I = shape[-1]
    M = x.numel() // I if I else 0
    if not 0 < M <= MOST_VECTORS[dtype]:
        return None
    function = entry(NAMES[dtype], POINTER, INTEGER, POINTER, INTEGER, INTEGER, INTEGER)
    if function is None:
        return None
    x = x if x.is_contiguous() else x.contiguous()
    fields: list[int] = []
    made = []
    for weight, bias in maps:
        O, width = weight.shape
        if weight.dtype != dtype or width != I or weight.stride(1) != 1 or not applies(weight):
            return None
        at = 0
        if bias is not None:
            if bias.dtype != dtype or not bias.is_contiguous() or not applies(bias):
                return None
            at = bias.data_ptr()
        y = x.new_empty((*shape[:-1], O))
        made.append(y)
        fields += (weight.data_ptr(), at, y.data_ptr(), O, weight.stride(0), O)
    function(pointers(fields), len(maps), x.data_ptr(), M, I, I)
    return made
