"""Normalisation of rows, one program each, or one for each group of a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quintet.triton.launching import launch, power_of_two, takes

# A row is held in registers.
LONGEST = 16384


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """Return x / sqrt(mean(x²) + eps) · weight; x (..., C), weight (C) or (..., C) broadcast."""
    C = x.shape[-1] if x.ndim else 0
    fits = weight.shape == (C,) and weight.is_contiguous() and weight.dtype == x.dtype
    if not fits or not 0 < C <= LONGEST or not x.is_floating_point() or not takes(x, weight):
        return None
    rows = x.reshape(-1, C)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    C_BLOCK = power_of_two(C)
    launch(
        _rms_norm,
        (len(rows),),
        rows,
        weight,
        output,
        rows.stride(0),
        C,
        eps,
        C_BLOCK=C_BLOCK,
        num_warps=min(max(C_BLOCK // 256, 1), 16),
    )
    return output.view(x.shape)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, num_groups: int, eps: float) -> Tensor:
    """Return y · silu(z), each of the groups normalised by itself, times weight (I), (N, I).

    Shapes: y (N, I) in float32 without gaps, z (N, I), whose dtype is that of the result.
    """
    N, I = z.shape
    output = z.new_empty(N, I)
    C = I // num_groups
    C_BLOCK = power_of_two(C)
    launch(
        _gated_rms_norm,
        (N, num_groups),
        y,
        z,
        z.stride(0),
        weight,
        output,
        I,
        C,
        eps,
        C_BLOCK=C_BLOCK,
        num_warps=min(max(C_BLOCK // 256, 1), 16),
    )
    return output


@triton.jit
def _rms_norm(x, weight, output, step, C, eps, C_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C_BLOCK)
    inside = c < C
    y = tl.load(x + row * step + c, mask=inside, other=0.0)
    wide = y.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide) / C + eps)
    # Rounded before the weight, as the definition is.
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * C + c, (scaled.to(y.dtype).to(tl.float32) * w).to(y.dtype), mask=inside)


@triton.jit
def _gated_rms_norm(  # type: ignore[no-untyped-def]
    y, z, z_step, weight, output, I, C, eps, C_BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, C_BLOCK)
    inside = within < C
    c = tl.program_id(1) * C + within
    gate = tl.load(z + row * z_step + c, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(y + row * I + c, mask=inside, other=0.0) * (gate * tl.sigmoid(gate))
    scaled = wide * tl.rsqrt(tl.sum(wide * wide) / C + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * I + c, (scaled * w).to(output.dtype.element_ty), mask=inside)
