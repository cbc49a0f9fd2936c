"""The parts of decoder layers as the fused step's kernel reads them."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from quintet.kernels.calls import Call
from quintet.kernels.matrix import Kind, Matrix, kind_of, write, write_stack
from quintet.kernels.routing import Rules

LANES = 16


class Source(IntEnum):
    """A part's input: x, the side value, their sum, or x beside the embeddings (2C)."""

    HIDDEN, BESIDE, SUM, WITH_EMBEDS = range(4)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: scale, epsilon, and what it normalises."""

    weight: Tensor
    eps: float
    of: Source = Source.HIDDEN


class Adapted(NamedTuple):
    """A map with a low-rank addition: map(x) + up(down(x))."""

    map: Matrix
    down: Matrix | None = None
    up: Matrix | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """The inputs of a step besides hidden states: M packed tokens.

    Attributes:
        cos: (..., D) of the rotary angles: of all M tokens, or of those of one sequence where all
            have equally many and share them.
        sin: the same.
        embeds: of the shape of the hidden states.
        rows: the row of the cache that each sequence has, none of them twice.
        starts: the slot that its first token takes.
        lengths: how many tokens it has, at least one.
    """

    cos: Tensor
    sin: Tensor
    embeds: Tensor
    rows: Sequence[int]
    starts: Sequence[int]
    lengths: Sequence[int]


class Fields(Call):
    """Writes the fields of a part, for vectors of a dtype.

    Attributes:
        kind: how all matrices are held, known with the first of them.
        angles: the sizes of the heads that are rotated.
        room: how many slots there are for keys and values.
    """

    __slots__ = ("angles", "dtype", "kind", "room")

    def __init__(self, dtype: torch.dtype, kind: Kind | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.kind = kind
        self.angles: set[int] = set()
        self.room = sys.maxsize

    def norm(self, norm: Norm, C: int) -> None:
        """Write a norm of vectors (C,)."""
        self.packed(norm.weight, self.dtype, C)
        self.real(norm.eps)
        self.integers(norm.of)

    def slots(self, buffer: Tensor, rows: int, K: int, D: int) -> None:
        """Write the buffers of keys or values (rows, K, S, D)."""
        if buffer.ndim != 4:
            self.fit = False
            return
        self.room = min(self.room, buffer.shape[2])
        self.rows(buffer, self.dtype, rows, K, buffer.shape[2], D)

    def adapted(self, adapted: Adapted, O: int, I: int) -> None:
        """Write an adapted map from I to O."""
        _, down, up = adapted
        rank = 0 if down is None else down.weight.shape[0]
        for matrix, shape in zip(adapted, ((O, I), (rank, I), (O, rank)), strict=True):
            self.matrix(matrix, *shape)
        self.fit &= (down is None) == (up is None)

    def matrix(self, matrix: Matrix | None, O: int, I: int) -> None:
        """Write a map from I to O; zeros for None."""
        write(self, matrix, self._kind_of(matrix), self.dtype, O, I)

    def experts(self, matrix: Matrix, E: int, O: int, I: int) -> None:
        """Write a stack of E maps from I to O."""
        write_stack(self, matrix, self._kind_of(matrix), self.dtype, O, I, E)

    def _kind_of(self, matrix: Matrix | None) -> Kind:
        if matrix is not None and self.kind is None:
            self.kind = kind_of(matrix)
        return Kind.PLAIN if self.kind is None else self.kind


class Part(ABC):
    """A part of a layer, x += part(norm(x)), or one whose output is kept beside x.

    Attributes:
        number: what the kernel calls this kind of part.
    """

    number: ClassVar[int]

    @abstractmethod
    def write(self, fields: Fields, C: int) -> None:
        """Write the weights, for hidden states (M, C)."""

    def held(self, kept: Sequence[Tensor], fields: Fields, rows: int) -> None:
        """Write the cache buffers; none by default.

        Args:
            rows: how many sequences there is room for.
        """
        fields.fit &= not kept


@dataclass(frozen=True, slots=True)
class Attention(Part):
    """Attention of H heads to keys and values of K heads, (rows, K, S, D) each.

    Attributes:
        qkv: the maps to the queries', the keys' and the values' heads.
        o: from (H·D) to C.
        window: how many keys a query sees at the most, its own included; None for all.
        scale: of the scores.
        rotates: whether positions turn queries and keys.
        beside: whether what it makes is left beside x, and not added to it.
    """

    number: ClassVar[int] = 0
    norm: Norm
    qkv: tuple[Adapted, Adapted, Adapted]
    o: Matrix
    head_dim: int
    window: int | None
    scale: float
    rotates: bool = True
    beside: bool = False

    def write(self, fields: Fields, C: int) -> None:
        """Write norm, maps and sizes."""
        D, I = self.head_dim, len(self.norm.weight)
        H, K = (self.qkv[i].map.weight.shape[0] // D for i in (0, 1))
        fields.fit &= D % LANES == 0 and K > 0 and H % K == 0
        # All have an addition or none.
        fields.fit &= len({adapted.down is None for adapted in self.qkv}) == 1
        fields.norm(self.norm, 2 * C if self.norm.of == Source.WITH_EMBEDS else C)
        for adapted, heads in zip(self.qkv, (H, K, K), strict=True):
            fields.adapted(adapted, heads * D, I)
        fields.matrix(self.o, C, H * D)
        fields.integers(H, K, D, self.window or 0, self.rotates, self.beside)
        fields.angles |= {D} if self.rotates else set()
        fields.real(self.scale)

    def held(self, kept: Sequence[Tensor], fields: Fields, rows: int) -> None:
        """Write where the tokens' keys and values go."""
        K, D = self.qkv[1].map.weight.shape[0] // self.head_dim, self.head_dim
        fields.fit &= len(kept) == 2
        for buffer in kept:
            fields.slots(buffer, rows, K, D)


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
    """Mamba-2's mixer: window (rows, W - 1, H·P + 2·G·N), state (rows, H, P, N).

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
        fields.packed(self.taps, fields.dtype, channels, W)
        fields.packed(self.conv_bias, fields.dtype, channels)
        for scalars in self.scalars:
            fields.packed(scalars, torch.float32, H)
        fields.norm(self.gated, inner)
        fields.integers(H, P, self.num_groups, N, W)
        for limit in self.dt_limits:
            fields.real(limit)

    def held(self, kept: Sequence[Tensor], fields: Fields, rows: int) -> None:
        """Write window, state, and the recording memory if tokens are recorded.

        That are the projected tokens (at least M, H·P + channels + H), in the kernel's dtype.
        """
        H, P, N, channels, W = self._sizes()
        fields.fit &= len(kept) in (2, 3)
        if fields.fit:
            window, state, record = (*kept, None)[:3]
            fields.packed(window, fields.dtype, rows, W - 1, channels)
            fields.packed(state, torch.float32, rows, H, P, N)
            tokens = 0 if record is None else len(record)
            fields.packed(record, fields.dtype, tokens, H * P + channels + H)

    def _sizes(self) -> tuple[int, int, int, int, int]:
        H, inner = len(self.scalars[0]), len(self.gated.weight)
        channels, W = self.taps.shape
        return H, inner // H, (channels - inner) // 2 // self.num_groups, channels, W


@dataclass(frozen=True, slots=True)
class SharedMLP(Part):
    """linear(down(gelu(gate) · up)) of the side value, written back to it.

    Attributes:
        gate_up: to gate and up, the gate first.
        linear: from C to C.
    """

    number: ClassVar[int] = 3
    norm: Norm
    gate_up: Adapted
    down: Matrix
    linear: Matrix

    def write(self, fields: Fields, C: int) -> None:
        """Write norm and maps."""
        O = self.gate_up.map.weight.shape[0]
        fields.fit &= O % 2 == 0
        fields.norm(self.norm, C)
        fields.adapted(self.gate_up, O, C)
        fields.matrix(self.down, C, O // 2)
        fields.matrix(self.linear, C, C)


@dataclass(frozen=True, slots=True)
class Routed(Part):
    """Routed experts and a shared one: Σ p_a · expert_a(n) + shared(n).

    Attributes:
        router: (E, C), of which n makes the logits.
        wide: whether logits are float32; otherwise they are rounded as x is.
        rules: how experts are chosen.
        bias: (E,) of the choice, or None.
        experts: gate and up (E, F, C), and down (E, C, F).
        shared: gate, up and down; None without a shared expert.
        share: (1, C), of which σ(share n) is a factor of the shared expert; None for one.
    """

    number: ClassVar[int] = 4
    norm: Norm
    router: Tensor
    wide: bool
    rules: Rules
    bias: Tensor | None
    experts: tuple[Matrix, Matrix, Matrix]
    shared: tuple[Matrix, Matrix, Matrix] | None
    share: Tensor | None = None

    def write(self, fields: Fields, C: int) -> None:
        """Write norm, router, experts and their sizes."""
        E, F, _ = self.experts[0].weight.shape
        fields.norm(self.norm, C)
        fields.packed(self.router, fields.dtype, E, C)
        fields.integers(self.wide)
        self.rules.write(fields, E, self.bias)
        for matrix, (O, I) in zip(self.experts, ((F, C), (F, C), (C, F)), strict=True):
            fields.experts(matrix, E, O, I)
        fields.integers(E, C, F)
        width = 0 if self.shared is None else self.shared[0].weight.shape[0]
        shapes = (width, C), (width, C), (C, width)
        for one, (O, I) in zip(self.shared or (None,) * 3, shapes, strict=True):
            # The kernel adds no bias within an MLP.
            fields.fit &= one is None or one.bias is None
            fields.matrix(one, O, I)
        fields.integers(width)
        fields.packed(self.share, fields.dtype, 1, C)


@dataclass(frozen=True, slots=True)
class FinalNorm(Part):
    """x = norm(x), behind the last layer."""

    number: ClassVar[int] = 6
    norm: Norm

    def write(self, fields: Fields, C: int) -> None:
        """Write the norm."""
        fields.norm(self.norm, C)
