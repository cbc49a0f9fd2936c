"""What the parts of decoder layers hold, as the kernel that runs layers in one call reads it."""

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quintet.kernels.linear import Matrix, fits
from quintet.kernels.native import applies

__all__ = ["MLP", "Attention", "Fields", "Mixer", "Norm", "Part", "Tokens", "readable"]

LANES = 16


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm: its scale (C,) and what is added to the mean square."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a step brings, but for the hidden states.

    Attributes:
        cos: (B or 1, T, D) of the rotary angles.
        sin: the same.
        starts: the slot that each row's first token takes.
        counts: (B,) how many of a row's T tokens are real; None where all are.
    """

    cos: Tensor
    sin: Tensor
    starts: Sequence[int]
    counts: Tensor | None = None


class Fields:
    """Eight-byte fields for vectors of a dtype, and the tensors whose addresses are among them.

    Attributes:
        kind: the dtype in which all matrices are stored, known with the first of them.
        fit: whether the kernel can read all that was written so far.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kind: torch.dtype | None = None
        self.numbers: list[int] = []
        self.tensors: list[Tensor] = []
        self.fit = True

    def integers(self, *values: int) -> None:
        """Write numbers."""
        self.numbers += values

    def real(self, value: float) -> None:
        """Write a float64."""
        self.numbers += struct.unpack("q", struct.pack("d", value))

    def tensor(self, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Write the address of a tensor that has to be of a shape, packed; 0 for None."""
        if x is None:
            self.numbers.append(0)
            return
        self.fit &= x.shape == shape and x.dtype == dtype and x.is_contiguous()
        self.tensors.append(x)
        self.numbers.append(x.data_ptr())

    def norm(self, norm: Norm, C: int) -> None:
        """Write a norm of vectors (C,)."""
        self.tensor(norm.weight, (C,), self.dtype)
        self.real(norm.eps)

    def matrix(self, matrix: Matrix, O: int, I: int) -> None:
        """Write a map from I to O."""
        weight = matrix.weight
        self.kind = self.kind or weight.dtype
        self.fit &= fits(matrix, self.kind, I, self.dtype) and weight.shape[0] == O
        for tensor in matrix:
            if tensor is not None:
                self.tensors.append(tensor)
            self.numbers.append(0 if tensor is None else tensor.data_ptr())
        self.numbers += (O, weight.stride(0))


class Part(ABC):
    """A part of a layer, x += part(norm(x)).

    Attributes:
        number: what the kernel calls this kind of part.
    """

    number: ClassVar[int]

    @abstractmethod
    def write(self, fields: Fields, C: int) -> None:
        """Write what it holds, for hidden states (B, T, C)."""

    def held(self, kept: Sequence[Tensor], fields: Fields, B: int, tokens: Tokens) -> None:
        """Write what a step reads and changes of what is kept between steps: here, nothing."""
        fields.fit &= not kept


@dataclass(frozen=True, slots=True)
class Attention(Part):
    """Attention of H query heads over K heads of keys and values, kept as (B, K, S, D) each.

    Attributes:
        qkv: three maps of C; the heads are the queries', the keys' and the values'.
        o: from (H·D) to C.
        window: how many keys a query sees at the most, its own included; None for all.
        scale: of the scores.
    """

    number: ClassVar[int] = 0
    norm: Norm
    qkv: tuple[Matrix, Matrix, Matrix]
    o: Matrix
    head_dim: int
    window: int | None
    scale: float

    def write(self, fields: Fields, C: int) -> None:
        """Write norm, maps and sizes."""
        D = self.head_dim
        H, K = (self.qkv[i].weight.shape[0] // D for i in (0, 1))
        fields.fit &= D % LANES == 0 and K > 0 and H % K == 0
        fields.norm(self.norm, C)
        for matrix, heads in zip(self.qkv, (H, K, K), strict=True):
            fields.matrix(matrix, heads * D, C)
        fields.matrix(self.o, C, H * D)
        fields.integers(H, K, D, self.window or 0)
        fields.real(self.scale)

    def held(self, kept: Sequence[Tensor], fields: Fields, B: int, tokens: Tokens) -> None:
        """Write where the tokens' keys and values go."""
        K, D = self.qkv[1].weight.shape[0] // self.head_dim, self.head_dim
        cos, sin = tokens.cos, tokens.sin
        T, last = cos.shape[1], max(tokens.starts) + cos.shape[1]
        angles = cos.shape == sin.shape == (len(cos), T, D) and len(cos) in (1, B)
        fields.fit &= angles and len(kept) == 2
        for buffer in kept:
            strides = buffer.stride()
            room = buffer.ndim == 4 and buffer.shape[2] >= last and strides[3] == 1
            fields.fit &= room and buffer.dtype == fields.dtype
            fields.fit &= room and buffer.shape == (B, K, buffer.shape[2], D)
            fields.tensors.append(buffer)
            fields.integers(buffer.data_ptr(), *strides[:3])


@dataclass(frozen=True, slots=True)
class MLP(Part):
    """down(silu(gate(n)) · up(n)), through F numbers a token."""

    number: ClassVar[int] = 1
    norm: Norm
    gate: Matrix
    up: Matrix
    down: Matrix

    def write(self, fields: Fields, C: int) -> None:
        """Write norm, maps and their width."""
        F = self.gate.weight.shape[0]
        # The kernel adds no bias within an MLP.
        fields.fit &= self.gate.bias is None and self.up.bias is None
        fields.norm(self.norm, C)
        for matrix, (O, I) in zip(
            (self.gate, self.up, self.down), ((F, C), (F, C), (C, F)), strict=True
        ):
            fields.matrix(matrix, O, I)
        fields.integers(F)


@dataclass(frozen=True, slots=True)
class Mixer(Part):
    """Mamba-2's mixer: a window (B, W - 1, H·P + 2·G·N) and a state (B, H, P, N) are kept.

    Attributes:
        in_proj: from C to the gate, the convolution's channels and the step sizes.
        out_proj: from H·P to C.
        taps: of the convolution, (H·P + 2·G·N, W).
        conv_bias: of the same.
        scalars: dt_bias, A_log and D, (H) each, in float32.
        gated: the norm behind the gate, of each group by itself.
        num_groups: G.
        dt_limits: between which two a step size is clamped.
    """

    number: ClassVar[int] = 2
    norm: Norm
    in_proj: Matrix
    out_proj: Matrix
    taps: Tensor
    conv_bias: Tensor | None
    scalars: tuple[Tensor, Tensor, Tensor]
    gated: Norm
    num_groups: int
    dt_limits: tuple[float, float]

    def write(self, fields: Fields, C: int) -> None:
        """Write norms, maps, scalars and sizes."""
        H, P, N, channels, W = self._sizes()
        inner = H * P
        fields.fit &= P % LANES == 0 and N % LANES == 0
        fields.norm(self.norm, C)
        fields.matrix(self.in_proj, inner + channels + H, C)
        fields.matrix(self.out_proj, C, inner)
        fields.tensor(self.taps, (channels, W), fields.dtype)
        fields.tensor(self.conv_bias, (channels,), fields.dtype)
        for scalars in self.scalars:
            fields.tensor(scalars, (H,), torch.float32)
        fields.norm(self.gated, inner)
        fields.integers(H, P, self.num_groups, N, W)
        for limit in self.dt_limits:
            fields.real(limit)

    def held(self, kept: Sequence[Tensor], fields: Fields, B: int, tokens: Tokens) -> None:
        """Write where the window and the state are."""
        H, P, N, channels, W = self._sizes()
        fields.fit &= len(kept) == 2
        shapes = ((B, W - 1, channels), fields.dtype), ((B, H, P, N), torch.float32)
        for tensor, (shape, dtype) in zip(kept, shapes, strict=False):
            fields.tensor(tensor, shape, dtype)

    def _sizes(self) -> tuple[int, int, int, int, int]:
        H, inner = len(self.scalars[0]), len(self.gated.weight)
        channels, W = self.taps.shape
        return H, inner // H, (channels - inner) // 2 // self.num_groups, channels, W


def readable(fields: Fields) -> bool:
    """Tell whether the kernel may read all that was written."""
    return fields.fit and applies(*fields.tensors)
