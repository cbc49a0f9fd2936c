"""How a matrix is held in fewer bits: named tensors, and what they mean together.

A format splits a matrix (O, I) into *parts*. A part is named by what is appended to the weight's
own name, so that `q_proj.weight` is held as `q_proj.weight` and `q_proj.weight_scale`; so it is on
disk too, unless a format has to follow somebody else's names.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.kernels.linear import Matrix
from quintet.ops.group_fit import quantize_groups
from quintet.ops.groups import PACK, group_count, number_shape
from quintet.ops.linear import linear
from quintet.ops.quantized import (
    FP8_BLOCK,
    decode,
    dequantize_fp8,
    fp8_linears,
    fp8_scale_shape,
    int4_shapes,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    quantized_linears,
)
from quintet.parallel.placement import Shard
from quintet.quantization.cutting import Grain, is_alone, shards_by

# So many numbers of 4 bits lie among each other in half as many bytes.
PACKED = Grain(columns=PACK, width=PACK // 2, packed=True)
Shape = tuple[int, ...]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor of a format."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightFormat(ABC):
    """A way to hold a matrix (O, I)."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called where people read it."""

    @abstractmethod
    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return shape and dtype of each part of a matrix; "" carries most of its bytes."""

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Split a matrix of numbers into parts.

        Raises:
            InputError: a number is not finite.
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the parts stand for."""

    def cuts(self, row: int) -> bool:
        """Tell whether the parts, cut there too, are those of the matrix cut before a row."""
        return False

    # -- among processes ---------------------------------------------------------------------

    def grains(self, shape: Shape) -> dict[str, Grain] | None:
        """Return how each part lies over a matrix of `shape`; None where it is in one piece."""
        return None

    def shards(self, shard: Shard) -> dict[str, Shard] | None:
        """Return what of each part belongs to the shard of a matrix; None where none could say."""
        grains = self.grains(shard.shape)
        return None if grains is None else shards_by(grains, shard)

    def alone(self, shard: Shard) -> bool:
        """Tell whether the shard of a matrix, encoded, is the same shard of the encoded matrix."""
        grains = self.grains(shard.shape)
        return grains is not None and is_alone(grains, shard)

    @property
    def divided(self) -> "WeightFormat":
        """The format that says exactly the same, in which processes have shards."""
        return self

    # -- products ----------------------------------------------------------------------------

    def linear(self, x: Tensor, parts: Parts, shape: Shape, bias: Tensor | None) -> Tensor:
        """Return x wᵀ + b; x (..., I)."""
        return linear(x, self.decode(parts, shape, x.dtype), bias)

    def matrix(self, parts: Parts, bias: Tensor | None = None) -> Matrix | None:
        """Return parts, or stacks of them, as kernels read them; None if they cannot."""
        return None

    def linears(
        self, x: Tensor, maps: Sequence[tuple[Parts, Shape, Tensor | None]]
    ) -> Sequence[Tensor]:
        """Return x wᵀ + b for several matrices, in one pass if that is faster."""
        return [self.linear(x, *one) for one in maps]

    # -- on disk -----------------------------------------------------------------------------

    @property
    def parts_of(self) -> "WeightFormat":
        """The format whose parts these are; another one if only what is on disk differs."""
        return self

    @property
    def held(self) -> "WeightFormat | None":
        """The format in which a model holds what a file holds in this one; None for numbers."""
        return self.parts_of

    def recast(self, parts: Parts, shape: Shape, to: "WeightFormat") -> dict[str, Tensor] | None:
        """Return the parts in another format if that is no rounding; None if it would be one."""
        return dict(parts) if to.parts_of == self.parts_of else None

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        """Return, for each tensor on disk, its name and shape; that of the key "" comes first."""
        return {suffix: (weight + suffix, part.shape) for suffix, part in self.parts(shape).items()}

    def pack(
        self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Name the parts as they are on disk; `dtype` is the model's."""
        return {weight + suffix: part for suffix, part in parts.items()}

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors that `files` names by their keys.

        Raises:
            CheckpointError: what is there does not belong together.
        """
        return dict(found)

    def checked(self, weight: str, parts: Parts) -> Parts:
        """Return parts, or what a process has of them, if numbers can be made of them.

        Raises:
            CheckpointError: they are damaged.
        """
        return parts


class _Integers(WeightFormat):
    """Integers of a row or a part of one, and their scales, which kernels multiply as they are."""

    def cuts(self, row: int) -> bool:
        """Tell whether the parts, cut there too, are those of the matrix cut before a row."""
        return True

    def recast(self, parts: Parts, shape: Shape, to: WeightFormat) -> dict[str, Tensor] | None:
        """Return the parts in another format if that is no rounding; None if it would be one."""
        # How numbers of ours lie says all of what they mean.
        alike = isinstance(to, _Integers) and self.parts(shape) == to.parts(shape)
        return dict(parts) if alike else None

    def matrix(self, parts: Parts, bias: Tensor | None = None) -> Matrix:
        """Return the parts as kernels read them."""
        return Matrix(parts[""], parts["_scale"], bias)

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the parts stand for."""
        return decode(self.matrix(parts), shape[-1], dtype)

    def linear(self, x: Tensor, parts: Parts, shape: Shape, bias: Tensor | None) -> Tensor:
        """Return x wᵀ + b; x (..., I)."""
        return self.linears(x, [(parts, shape, bias)])[0]

    def linears(
        self, x: Tensor, maps: Sequence[tuple[Parts, Shape, Tensor | None]]
    ) -> Sequence[Tensor]:
        """Return x wᵀ + b for several matrices, in one pass if that is faster."""
        return quantized_linears(x, [self.matrix(parts, bias) for parts, _, bias in maps])


@dataclass(frozen=True)
class Int8Format(_Integers):
    """Rows of 8-bit integers, each with a float32 scale."""

    name = "int8"

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return shape and dtype of each part of a matrix of `shape`."""
        return {"": TensorSpec(shape, torch.int8), "_scale": TensorSpec(shape[:-1], torch.float32)}

    def grains(self, shape: Shape) -> dict[str, Grain]:
        """Return how each part lies over a matrix: a scale is of all columns of a row."""
        return {"": Grain(), "_scale": Grain(columns=None)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Split a matrix of numbers into parts."""
        q, scale = quantize_int8(weight)
        return {"": q, "_scale": scale}


@dataclass(frozen=True)
class Int4Format(_Integers):
    """Groups of 64 4-bit integers, each with a bfloat16 scale."""

    name = "int4"

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return shape and dtype of each part of a matrix of `shape`."""
        packed, scale = int4_shapes(shape)
        return {"": TensorSpec(packed, torch.uint8), "_scale": TensorSpec(scale, torch.bfloat16)}

    def grains(self, shape: Shape) -> dict[str, Grain]:
        """Return how each part lies over a matrix of `shape`."""
        return {"": PACKED, "_scale": Grain(columns=PACK)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Split a matrix of numbers into parts."""
        packed, scale = quantize_int4(weight)
        return {"": packed, "_scale": scale}


@dataclass(frozen=True)
class GroupFormat(_Integers):
    """Integers with a scale a group, and perhaps an offset: see `quintet.ops.groups`.

    Attributes:
        bits: 8 or 4.
        group: how many neighbours share a scale: 16 (with 8 bits), 32, 64 or another such power of
            two; None for a whole row.
        offset: whether groups have offsets.
        dtype: of scales and offsets.
        iq4: whether numbers of 4 bits are places in the table of GGUF's IQ4.
    """

    bits: int
    group: int | None
    offset: bool = False
    dtype: torch.dtype = torch.float16
    iq4: bool = False

    def __post_init__(self) -> None:
        least = {4: 32, 8: 16}.get(self.bits)
        size = self.group
        if least is None or not (size is None or (size >= least and size & (size - 1) == 0)):
            raise InputError(
                f"GroupFormat: bits={shown(self.bits)} and group={shown(size)}; bits have to be 4 "
                "or 8, and a group a power of two from 32 on, or 16, of 8 bits"
            )
        if self.iq4 and (self.bits != 4 or self.offset):
            raise InputError("GroupFormat: iq4=True is for 4 bits without offsets")

    @property
    def name(self) -> str:
        """What it is called where people read it."""
        size = "a row" if self.group is None else str(self.group)
        kind = "iq4" if self.iq4 else f"int{self.bits}"
        return f"{kind} by {size}{' with offsets' if self.offset else ''}"

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return shape and dtype of each part of a matrix of `shape`."""
        numbers = torch.int8 if self.bits == 8 else torch.uint8
        scales = TensorSpec((*shape[:-1], group_count(shape[-1], self.group)), self.dtype)
        specs = {"": TensorSpec(number_shape(shape, self.bits), numbers), self._scale: scales}
        return {**specs, "_offset": scales} if self.offset else specs

    def grains(self, shape: Shape) -> dict[str, Grain]:
        """Return how each part lies over a matrix of `shape`."""
        scale = Grain(columns=self.group or max(shape[-1], 1))
        found = {"": Grain() if self.bits == 8 else PACKED, self._scale: scale}
        return {**found, "_offset": scale} if self.offset else found

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Split a matrix of numbers into parts."""
        numbers, scale, offset = quantize_groups(
            weight,
            self.bits,
            self.group,
            offset=self.offset,
            dtype=self.dtype,
            iq4=self.iq4,
        )
        parts = {"": numbers, self._scale: scale}
        return parts if offset is None else {**parts, "_offset": offset}

    def matrix(self, parts: Parts, bias: Tensor | None = None) -> Matrix:
        """Return the parts as kernels read them."""
        return Matrix(parts[""], parts[self._scale], bias, parts.get("_offset"), self.iq4)

    @property
    def _scale(self) -> str:
        # What the numbers mean is seen by the names of what is beside them.
        return "_scale_iq4" if self.iq4 else "_scale"


@dataclass(frozen=True)
class FP8Format(WeightFormat):
    """Blocks of e4m3 numbers, each with a scale: the released weights of DeepSeek-V3 and R1.

    Attributes:
        block: rows and columns of a block.
        powers: whether scales are powers of two, as in V3.1.
    """

    name = "fp8"
    block: tuple[int, int] = FP8_BLOCK
    powers: bool = False

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return shape and dtype of each part of a matrix of `shape`."""
        scales = fp8_scale_shape(shape, self.block)
        return {
            "": TensorSpec(shape, torch.float8_e4m3fn),
            "_scale_inv": TensorSpec(scales, torch.float32),
        }

    def grains(self, shape: Shape) -> dict[str, Grain]:
        """Return how each part lies over a matrix of `shape`."""
        return {"": Grain(), "_scale_inv": Grain(*self.block)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Split a matrix of numbers into parts."""
        q, scale_inv = quantize_fp8(weight, self.block, powers=self.powers)
        return {"": q, "_scale_inv": scale_inv}

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the parts stand for."""
        return dequantize_fp8(parts[""], parts["_scale_inv"], dtype, self.block)

    def matrix(self, parts: Parts, bias: Tensor | None = None) -> Matrix:
        """Return the parts as kernels read them."""
        return Matrix(parts[""], parts["_scale_inv"], bias, block=self.block)

    def linears(
        self, x: Tensor, maps: Sequence[tuple[Parts, Shape, Tensor | None]]
    ) -> Sequence[Tensor]:
        """Return x wᵀ + b for several matrices, in one pass if that is faster."""
        return fp8_linears(x, [self.matrix(parts, bias) for parts, _, bias in maps])

    def cuts(self, row: int) -> bool:
        """Tell whether the parts, cut there too, are those of the matrix cut before a row."""
        return row % self.block[0] == 0

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts; scales that are powers of two may lie there in a byte each."""
        return {**found, "_scale_inv": found["_scale_inv"].to(torch.float32)}
