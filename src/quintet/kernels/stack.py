"""All layers of a dense decoder for few tokens, in one call."""

import ctypes
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.kernels.linear import Matrix, fits, kernel_name
from quintet.kernels.native import POINTER, REAL, applies, entry, pointers

__all__ = ["Block", "stack"]

LANES = 16
# Beyond so many tokens, calls of their own cost little beside what the layers compute.
MOST_TOKENS: Mapping[str, int] = MappingProxyType(
    {"bf16": 16, "f32": 16, "int8_bf16": 8, "int8_f32": 8, "int4_bf16": 8, "int4_f32": 8}
)


class Block(NamedTuple):
    """A layer x += o(attention(norm(x))), x += down(silu(gate(n)) · up(n)) with n = norm(x).

    Attributes:
        attention_norm: (C,), the scale of the first root-mean-square norm.
        qkv: three maps of C; the heads are the queries', the keys' and the values'.
        o: from (H·D) to C.
        mlp_norm: (C,).
        gate: from C to F.
        up: the same.
        down: from F to C.
        keys: (B, K, S, D) with room for the new tokens, which are written.
        values: the same.
        window: how many keys a query sees at the most, its own included; None for all.
    """

    attention_norm: Tensor
    qkv: tuple[Matrix, Matrix, Matrix]
    o: Matrix
    mlp_norm: Tensor
    gate: Matrix
    up: Matrix
    down: Matrix
    keys: Tensor
    values: Tensor
    window: int | None


def stack(
    x: Tensor,
    blocks: Sequence[Block],
    cos: Tensor,
    sin: Tensor,
    *,
    starts: Sequence[int],
    scale: float,
    eps: float,
) -> Tensor | None:
    """Return what the layers make of x (B, T, C), the last one's sum; None if they cannot.

    Row b's tokens take the slots from `starts[b]` on. Shapes: cos and sin (B or 1, T, D).
    """
    dtype, (B, T, C) = x.dtype, x.shape
    kind = blocks[0].o.weight.dtype
    name = kernel_name(kind, dtype)
    # Asked before the library is: a compiler that traces this must not look into it.
    if not 0 < B * T <= MOST_TOKENS.get(name, 0) or not applies(x, cos, sin):
        return None
    function = entry(f"quintet_stack_{name}", POINTER, REAL, REAL)
    K, D = blocks[0].keys.shape[1], blocks[0].keys.shape[3]
    width, F = blocks[0].o.weight.shape[0], blocks[0].gate.weight.shape[0]
    H = blocks[0].qkv[0].weight.shape[0] // D
    if function is None or D % LANES or H % K or width != C or len(starts) != B:
        return None
    if cos.shape != sin.shape or cos.shape[0] not in (1, B) or cos.shape[1:] != (T, D):
        return None
    tensors = [x, cos, sin]
    if any(t.dtype != dtype or not t.is_contiguous() for t in (cos, sin)):
        return None
    last = max(starts) + T
    fields: list[int] = []
    for block in blocks:
        for norm in (block.attention_norm, block.mlp_norm):
            if norm.dtype != dtype or norm.shape != (C,) or not norm.is_contiguous():
                return None
            tensors.append(norm)
            fields.append(norm.data_ptr())
        maps = (*block.qkv, block.o, block.gate, block.up, block.down)
        shapes = ((C, H * D), (C, K * D), (C, K * D), (H * D, C), (C, F), (C, F), (F, C))
        for matrix, (I, O) in zip(maps, shapes, strict=True):
            if matrix.weight.shape[0] != O or not fits(matrix, kind, I, dtype):
                return None
            for tensor in matrix:
                fields.append(0 if tensor is None else tensor.data_ptr())
                if tensor is not None:
                    tensors.append(tensor)
            fields += (O, matrix.weight.stride(0))
        # The kernel adds no bias within an MLP.
        if block.gate.bias is not None or block.up.bias is not None:
            return None
        for held in (block.keys, block.values):
            if held.dtype != dtype or held.shape[:2] != (B, K) or held.shape[3] != D:
                return None
            if held.stride(3) != 1 or held.shape[2] < last:
                return None
            tensors.append(held)
        fields += (block.keys.data_ptr(), block.values.data_ptr())
        fields += (*block.keys.stride()[:3], *block.values.stride()[:3], block.window or 0)
    if not applies(*tensors):
        return None
    y = x.clone(memory_format=torch.contiguous_format)
    layers, slots = pointers(fields), pointers(starts)
    angle_row = T * D if cos.shape[0] > 1 else 0
    call = [ctypes.addressof(layers), y.data_ptr(), cos.data_ptr(), sin.data_ptr()]
    call += (ctypes.addressof(slots), len(blocks), angle_row, B, T, C, F, H, K, D)
    function(pointers(call), eps, scale)
    return y
