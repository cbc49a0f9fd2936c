"""Products with weights of e4m3 in blocks by DeepGEMM, which rounds the rows to e4m3, too."""

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from quintet.backends import Backend, Implementation
from quintet.kernels.matrix import Matrix
from quintet.published.packages import lacking, takes

_E4M3, _BLOCK = torch.float8_e4m3fn, 128
_LARGEST = torch.finfo(_E4M3).max
# Fewer rows are bound by how fast weights are read; the kernels of this package round no row.
_FEW = 64


class DeepGEMM(Protocol):
    """The functions of the package that are called."""

    def fp8_gemm_nt(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor) -> None:
        """Write a·bᵀ to d (M, O) in bfloat16; a (M, I) and b (O, I), and the scales of each."""
        ...


def linears(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor] | None:
    """Return x·Wᵀ + b for each of `maps`, (..., O), of rows in blocks of 1 x 128 in e4m3.

    That is how DeepSeek-V3 was trained (arXiv:2412.19437, §3.3.2), and not what
    `ops.quantized.fp8_linears` defines: a row is off by what e4m3 rounds, too.
    """
    given = [x, *(y for one in maps for y in (one.weight, one.scale, one.bias) if y is not None)]
    I = x.shape[-1] if x.ndim else 0
    fits = x.dtype == torch.bfloat16 and I and I % _BLOCK == 0 and x.numel() > _FEW * I
    if not fits or not all(_fits(one, I) for one in maps) or not takes(*given):
        return None
    package = cast("DeepGEMM", import_module("deep_gemm"))
    rows = x.reshape(-1, I)
    coded, outputs = rounded(rows), []
    for one in maps:
        assert one.scale is not None
        y = rows.new_empty(len(rows), len(one.weight))
        package.fp8_gemm_nt(coded, (one.weight, one.scale), y)
        outputs.append((y if one.bias is None else y + one.bias).view(*x.shape[:-1], -1))
    return outputs


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (M, I) in e4m3, and the scale of each 128 numbers, (M, I / 128) in float32."""
    wide = torch.unflatten(x.float(), 1, (-1, _BLOCK))
    # Of zeros the scale is none at all.
    scale = wide.abs().amax(2, keepdim=True).clamp(min=1e-4) / _LARGEST
    return (wide / scale).flatten(1).to(_E4M3), scale.squeeze(2)


def _fits(matrix: Matrix, I: int) -> bool:
    weight, scale = matrix.weight, matrix.scale
    return (
        weight.dtype == _E4M3
        and weight.ndim == 2
        and weight.shape[1] == I
        and weight.is_contiguous()
        and matrix.block == (_BLOCK, _BLOCK)
        and scale is not None
        and scale.dtype == torch.float32
        and scale.is_contiguous()
    )


BACKEND = Backend(
    name="deep-gemm",
    device="cuda",
    implementations={
        "fp8 linear": (
            Implementation(linears, frozenset({torch.bfloat16}), "many rows, rounded to e4m3"),
        )
    },
    # Those after want scales that are powers of two.
    missing=lacking("deep_gemm", 90, 90),
    on_request=True,
)
