"""All layers of a dense decoder for few tokens, in one call."""

import ctypes
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from quintet.kernels.linear import Matrix, fits, kernel_name
from quintet.kernels.native import POINTER, REAL, applies, entry, pointers

__all__ = ["Block", "Stack"]

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
        window: how many keys a query sees at the most, its own included; None for all.
    """

    attention_norm: Tensor
    qkv: tuple[Matrix, Matrix, Matrix]
    o: Matrix
    mlp_norm: Tensor
    gate: Matrix
    up: Matrix
    down: Matrix
    window: int | None


class Stack:
    """Layers as the kernel reads them: checked, and their addresses taken down once.

    It holds on to the weights it was made of, which it reads whatever the modules hold by then.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        tensors: list[Tensor],
        fields: list[int],
        sizes: tuple[int, int, int, int, int, int],
    ) -> None:
        self._name, self._dtype, self._tensors = name, dtype, tensors
        self._layers = pointers(fields)
        self._count, self._C, self._F, self._H, self._K, self._D = sizes

    @classmethod
    def of(cls, blocks: Sequence[Block], *, head_dim: int, dtype: torch.dtype) -> Self | None:
        """Return the layers for vectors of a dtype; None where the kernel does not apply."""
        kind, D = blocks[0].o.weight.dtype, head_dim
        C, F = blocks[0].o.weight.shape[0], blocks[0].gate.weight.shape[0]
        H, K = (blocks[0].qkv[i].weight.shape[0] // D for i in (0, 1))
        name = kernel_name(kind, dtype)
        if name not in MOST_TOKENS or D % LANES or not K or H % K:
            return None
        tensors: list[Tensor] = []
        fields: list[int] = []
        shapes = ((C, H * D), (C, K * D), (C, K * D), (H * D, C), (C, F), (C, F), (F, C))
        for block in blocks:
            for norm in (block.attention_norm, block.mlp_norm):
                if norm.dtype != dtype or norm.shape != (C,) or not norm.is_contiguous():
                    return None
                tensors.append(norm)
                fields.append(norm.data_ptr())
            maps = (*block.qkv, block.o, block.gate, block.up, block.down)
            for matrix, (I, O) in zip(maps, shapes, strict=True):
                if matrix.weight.shape[0] != O or not fits(matrix, kind, I, dtype):
                    return None
                tensors += [tensor for tensor in matrix if tensor is not None]
                fields += (0 if tensor is None else tensor.data_ptr() for tensor in matrix)
                fields += (O, matrix.weight.stride(0))
            # The kernel adds no bias within an MLP.
            if block.gate.bias is not None or block.up.bias is not None:
                return None
            fields.append(block.window or 0)
        if not applies(*tensors):
            return None
        return cls(name, dtype, tensors, fields, (len(blocks), C, F, H, K, D))

    def run(
        self,
        x: Tensor,
        held: Sequence[tuple[Tensor, Tensor]],
        cos: Tensor,
        sin: Tensor,
        *,
        starts: Sequence[int],
        scale: float,
        eps: float,
    ) -> Tensor | None:
        """Return what the layers make of x (B, T, C), the last one's sum; None if they cannot.

        Row b's tokens take the slots from `starts[b]` on, where their keys and values are written.

        Shapes: each of `held`, keys and values (B, K, S, D); cos and sin (B or 1, T, D).
        """
        (B, T, C), K, D = x.shape, self._K, self._D
        # Asked before the library is: a compiler that traces this must not look into it.
        if not 0 < B * T <= MOST_TOKENS[self._name] or not applies(x, cos, sin):
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors):
            return None
        function = entry(f"quintet_stack_{self._name}", POINTER, REAL, REAL)
        if function is None or self._C != C or len(starts) != B or len(held) != self._count:
            return None
        if cos.shape != sin.shape or cos.shape[0] not in (1, B) or cos.shape[1:] != (T, D):
            return None
        if any(t.dtype != self._dtype for t in (x, cos, sin)):
            return None
        if not cos.is_contiguous() or not sin.is_contiguous():
            return None
        last = max(starts) + T
        fields: list[int] = []
        for pair in held:
            for buffer in pair:
                _, _, S, _ = shape = buffer.shape
                strides = buffer.stride()
                if shape != (B, K, S, D) or last > S or strides[3] != 1:
                    return None
                if buffer.dtype != self._dtype or not applies(buffer):
                    return None
                fields += (buffer.data_ptr(), *strides[:3])
        y = x.clone(memory_format=torch.contiguous_format)
        buffers, slots = pointers(fields), pointers(starts)
        angle_row = T * D if cos.shape[0] > 1 else 0
        call = [ctypes.addressof(self._layers), ctypes.addressof(buffers), y.data_ptr()]
        call += (cos.data_ptr(), sin.data_ptr(), ctypes.addressof(slots), self._count)
        call += (angle_row, B, T, C, self._F, self._H, K, D)
        function(pointers(call), eps, scale)
        return y
