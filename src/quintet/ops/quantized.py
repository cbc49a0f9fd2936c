"""Quantised weights, 8 and 4 bits and FP8: the definition of the formats.

    int8   w ≈ q · scale            one scale a row
    int4   w ≈ (q - 8) · scale      one scale for 64 neighbours of a row
    groups                          with offsets, of any size: see `quintet.ops.groups`
    fp8    w ≈ q · scale_inv        one scale for a block, of 128 x 128 in released checkpoints

A weight is (..., O, I), the leading axes those of a stack of experts. Everything works through
bands of rows, so that no more than a few megabytes are ever there in float32.

An int4 weight is packed two numbers a byte, as those of `quintet.ops.groups` are. Rows are filled
up to whole groups with zeros.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.backends import operation
from quintet.errors import InputError
from quintet.kernels.matrix import Matrix
from quintet.ops.group_fit import quantize_groups
from quintet.ops.groups import widen_groups
from quintet.ops.linear import linear

INT4_GROUP = 64
FP8_BLOCK = (128, 128)
# Small enough that a band in float32 stays in the cache between its operations.
_BAND = 2**18
_WIDE_BAND = 2**21


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to multiples of a 127th of its largest magnitude.

    Returns q int8 (..., O, I) and scale float32 (..., O).

    Raises:
        InputError: a weight is not finite.
    """
    q = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
    for rows, target, scales in zip(
        bands(_rows(weight)),
        bands(_rows(q)),
        bands(scale.view(-1, 1), weight.shape[-1]),
        strict=True,
    ):
        band = rows.to(torch.float32)
        largest = _largest(band)
        torch.div(largest, 127, out=scales)
        target.copy_((band / _divisor(scales)).round_().clamp_(-127, 127))
    return q, scale


def dequantize_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return q · scale, rounded once; q (..., O, I), scale (..., O)."""
    return decode(Matrix(q, scale), q.shape[-1], dtype)


@operation("widen")
def decode(matrix: Matrix, columns: int, dtype: torch.dtype) -> Tensor:
    """Decode an integer weight (..., O, columns), rounded once."""
    weight, scale, _, offset, iq4 = matrix[:5]
    assert scale is not None
    if scale.ndim < weight.ndim:
        scale = scale.unsqueeze(-1)
    decoded = weight.new_empty((*weight.shape[:-1], columns), dtype=dtype)
    offsets = None if offset is None else bands(_rows(offset), columns)
    for rows, target, row_scale in zip(
        bands(_rows(weight), columns),
        bands(_rows(decoded)),
        bands(_rows(scale), columns),
        strict=True,
    ):
        band_offset = None if offsets is None else next(offsets)
        target.copy_(widen_groups(rows, row_scale, band_offset, columns, iq4=iq4))
    return decoded


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x wᵀ + b with w = q · scale; x (..., I), q (O, I), scale (O,)."""
    return quantized_linears(x, [Matrix(q, scale, bias)])[0]


def int4_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of `packed` and `scale` for a weight of `shape`."""
    groups = math.ceil(shape[-1] / INT4_GROUP)
    return (*shape[:-1], groups * INT4_GROUP // 2), (*shape[:-1], groups)


def quantize_int4(weight: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round each group of 64 to the sixteen multiples -8..7 of the best of several scales.

    One that makes -8 of the number of largest magnitude, whatever its sign, is among them.

    Args:
        weight: (..., O, I).
        gram: (I, I), Σ x xᵀ of inputs; see `quantize_groups`.

    Returns packed uint8 (..., O, ceil(I / 64) · 32) and scale bfloat16 (..., O, ceil(I / 64)).

    Raises:
        InputError: a weight is not finite.
    """
    if fill := -weight.shape[-1] % INT4_GROUP:
        weight = F.pad(weight, (0, fill))
        gram = None if gram is None else F.pad(gram, (0, fill, 0, fill))
    packed, scale, _ = quantize_groups(weight, 4, INT4_GROUP, dtype=torch.bfloat16, gram=gram)
    return packed, scale


def dequantize_int4(packed: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Decode the weight (..., O, columns), rounded once; `columns` is without padding."""
    return decode(Matrix(packed, scale), columns, dtype)


def int4_linear(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x wᵀ + b for an int4 weight; x (..., I), packed and scale of two axes."""
    return quantized_linears(x, [Matrix(packed, scale, bias)])[0]


@operation("quantised linear")
def quantized_linears(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor]:
    """Map x (..., I) by several integer weights, fused if a kernel can.

    Weights are of one dtype, int8 or uint8.
    """
    return [_in_bands(x, one) for one in maps]


def _in_bands(x: Tensor, matrix: Matrix) -> Tensor:
    # In bands that the multiplication finds in the cache.
    columns, height = x.shape[-1], len(matrix.weight)
    out = x.new_empty((*x.shape[:-1], height))
    step = max(_WIDE_BAND // max(columns, 1), 1)
    for start in range(0, height, step):
        rows = slice(start, start + step)
        band = matrix.rows(rows)
        out[..., rows] = linear(x, decode(band, columns, x.dtype), band.bias)
    return out


def fp8_scale_shape(shape: tuple[int, ...], block: tuple[int, int] = FP8_BLOCK) -> tuple[int, ...]:
    """Return the shape of a weight's block scales, partial blocks included."""
    return *shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1])


def quantize_fp8(
    weight: Tensor, block: tuple[int, int] = FP8_BLOCK, *, powers: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale each block to the range of e4m3 and round (DeepSeek-V3, arXiv:2412.19437, §3.3).

    Returns q float8_e4m3fn (..., O, I) and scale_inv float32, a 448th of the blocks' largest
    magnitudes, or with `powers` the next power of two from there up; see `fp8_scale_shape`.

    Raises:
        InputError: a weight is not finite.
    """
    q = torch.empty_like(weight, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scale = weight.new_empty(fp8_scale_shape(tuple(weight.shape), block), dtype=torch.float32)
    wide = weight.shape[-1]
    for block_row, rows in _block_rows(weight, block[0]):
        band = F.pad(weight[..., rows, :].to(torch.float32), (0, -wide % block[1]))
        band = torch.unflatten(band, -1, (-1, block[1]))  # (..., rows, blocks, columns)
        largest = _largest(band).amax(-3)
        scales = scale[..., block_row, :]
        scales.copy_(torch.div(largest, 448).squeeze(-1))
        if powers:
            scales.copy_(torch.where(scales > 0, scales.log2().ceil().exp2(), scales))
        band = band / _divisor(scales[..., None, :, None])
        q[..., rows, :] = band.flatten(-2)[..., :wide].to(q.dtype)
    return q, scale


def dequantize_fp8(
    q: Tensor, scale_inv: Tensor, dtype: torch.dtype, block: tuple[int, int] = FP8_BLOCK
) -> Tensor:
    """Return q · scale_inv of its block, multiplied in float32 and rounded once.

    Blocks begin at the first row and column; the last ones may be cut, as those of 576 rows are.

    Raises:
        InputError: there is not one scale for each block.
    """
    if scale_inv.shape != (wanted := fp8_scale_shape(tuple(q.shape), block)):
        raise InputError(
            f"a weight {list(q.shape)} in blocks of {block[0]} x {block[1]} has scales "
            f"{list(wanted)}, not {list(scale_inv.shape)}"
        )
    weight = torch.empty_like(q, dtype=dtype)
    for block_row, rows in _block_rows(q, block[0]):
        scales = scale_inv[..., block_row, :].to(torch.float32)
        wide = min(block[1], q.shape[-1])
        along = scales.repeat_interleave(wide, dim=-1)[..., None, : q.shape[-1]]
        weight[..., rows, :] = (q[..., rows, :].to(torch.float32) * along).to(dtype)
    return weight


@operation("fp8 linear")
def fp8_linears(x: Tensor, maps: Sequence[Matrix]) -> list[Tensor]:
    """Map x (..., I) by several FP8 weights in blocks, each widened and rounded once.

    The vectors are not rounded to e4m3, as DeepSeek-V3's own program does in 1 x 128 blocks
    (arXiv:2412.19437, §3.3.2): what a weight of few bits costs is its own rounding alone.
    """
    return [linear(x, _numbers(one, x.dtype), one.bias) for one in maps]


def _numbers(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    assert matrix.scale is not None
    assert matrix.block is not None
    return dequantize_fp8(matrix.weight, matrix.scale, dtype, matrix.block)


def bands(rows: Tensor, columns: int | None = None) -> Iterator[Tensor]:
    """Split a matrix into bands of rows with at most `_BAND` numbers each."""
    wide = max(rows.shape[-1] if columns is None else columns, 1)
    yield from torch.split(rows, max(_BAND // wide, 1))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x


def _block_rows(x: Tensor, height: int) -> Iterator[tuple[int, slice]]:
    for block_row, start in enumerate(range(0, x.shape[-2], height)):
        yield block_row, slice(start, min(start + height, x.shape[-2]))


def _divisor(scale: Tensor) -> Tensor:
    # Where a scale is zero, so are its numbers.
    return torch.where(scale == 0, 1.0, scale)


def _largest(band: Tensor) -> Tensor:
    largest = band.abs().amax(-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise InputError(
            "a weight that is NaN or infinite cannot be quantised; the checkpoint is damaged or "
            "its training diverged"
        )
    return largest
