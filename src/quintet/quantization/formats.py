"""Quantisation formats: the tensors of an encoded matrix, and their meaning.

A format splits a matrix (O, I) into *parts*. A part is named by what is appended to the weight's
own name, so that `q_proj.weight` is held as `q_proj.weight` and `q_proj.weight_scale`; so it is on
disk too, unless a format has to follow somebody else's names.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import CheckpointError, InputError, shown
from quintet.kernels.matrix import Matrix
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
    """A format of a matrix (O, I)."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name shown to people."""

    @abstractmethod
    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return shape and dtype of each part of a matrix of `shape`; "" is the largest."""

    @abstractmethod
    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        """Encode a matrix.

        Args:
            weight: (O, I).
            gram: (I, I), Σ x xᵀ of the inputs of a text, by which 4 bits make up in some weights
                for what others lost; None without one.

        Raises:
            InputError: a number is not finite.
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Decode the parts."""

    def cuts(self, row: int) -> bool:
        """Return whether cutting the matrix before a row commutes with encoding."""
        return False

    # -- among processes ---------------------------------------------------------------------

    def grains(self, shape: Shape) -> dict[str, Grain] | None:
        """Return the grain of each part over a matrix of `shape`, or None if it is one piece."""
        return None

    def shards(self, shard: Shard) -> dict[str, Shard] | None:
        """Return the shard of each part for a shard of the matrix, or None."""
        grains = self.grains(shard.shape)
        return None if grains is None else shards_by(grains, shard)

    def alone(self, shard: Shard) -> bool:
        """Return whether encoding a shard equals the shard of the encoded matrix."""
        grains = self.grains(shard.shape)
        return grains is not None and is_alone(grains, shard)

    @property
    def divided(self) -> "WeightFormat":
        """The equivalent format that can be sharded."""
        return self

    # -- products ----------------------------------------------------------------------------

    def linear(self, x: Tensor, parts: Parts, shape: Shape, bias: Tensor | None) -> Tensor:
        """Return x wᵀ + b; x (..., I)."""
        return linear(x, self.decode(parts, shape, x.dtype), bias)

    def matrix(self, parts: Parts, bias: Tensor | None = None) -> Matrix | None:
        """Return parts, or stacks of them, for kernels, or None."""
        return None

    def linears(
        self, x: Tensor, maps: Sequence[tuple[Parts, Shape, Tensor | None]]
    ) -> Sequence[Tensor]:
        """Return x wᵀ + b for several matrices, fused if that is faster."""
        return [self.linear(x, *one) for one in maps]

    # -- on disk -----------------------------------------------------------------------------

    @property
    def parts_of(self) -> "WeightFormat":
        """The format of the parts, if only the layout on disk differs; else itself."""
        return self

    @property
    def model_format(self) -> "WeightFormat | None":
        """The format a model uses for this file format; None for plain numbers."""
        return self.parts_of

    def recast(self, parts: Parts, shape: Shape, to: "WeightFormat") -> dict[str, Tensor] | None:
        """Convert the parts losslessly to another format, or return None."""
        return dict(parts) if to.parts_of == self.parts_of else None

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        """Return name and shape of each tensor on disk; the key "" comes first."""
        return {suffix: (weight + suffix, part.shape) for suffix, part in self.parts(shape).items()}

    def pack(
        self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Name the parts as on disk; `dtype` is the model's."""
        return {weight + suffix: part for suffix, part in parts.items()}

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors that `files` names.

        Raises:
            CheckpointError: what is there does not belong together.
        """
        return dict(found)

    def checked(self, weight: str, parts: Parts, shape: Shape) -> Parts:
        """Return the parts, or a shard of them, if they can be decoded.

        Raises:
            CheckpointError: they are damaged.
        """
        for suffix, spec in self.parts(shape).items():
            part = parts[suffix]
            if spec.dtype.is_floating_point and spec.dtype.itemsize > 1:
                require_finite(part, weight)
            elif part.dtype != spec.dtype:
                raise CheckpointError(
                    f"{weight + suffix} is {part.dtype}, and has to be {spec.dtype} in "
                    f"{self.name}; the file is damaged, or config.json another model's"
                )
        return parts


def require_finite(scale: Tensor, weight: str) -> None:
    """Require scales, or offsets, to be finite floating-point numbers.

    Raises:
        CheckpointError: they are not.
    """
    if not scale.is_floating_point():
        raise CheckpointError(
            f"{weight} has scales of {scale.dtype}, which have to be floating-point numbers; "
            "fetch the file again"
        )
    # Of numbers in 8 bits, PyTorch cannot say it.
    wide = scale.to(torch.float32) if scale.dtype.itemsize == 1 else scale
    if not bool(wide.isfinite().all()):
        raise CheckpointError(
            f"{weight} has scales that are not finite; the file is damaged, fetch it again"
        )


class _Integers(WeightFormat):
    """Integers per row or group with scales, which kernels multiply directly."""

    def cuts(self, row: int) -> bool:
        return True

    def recast(self, parts: Parts, shape: Shape, to: WeightFormat) -> dict[str, Tensor] | None:
        # How numbers of ours lie says all of what they mean.
        alike = isinstance(to.parts_of, _Integers) and self.parts(shape) == to.parts(shape)
        return dict(parts) if alike else None

    def matrix(self, parts: Parts, bias: Tensor | None = None) -> Matrix:
        return Matrix(parts[""], parts["_scale"], bias)

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        return decode(self.matrix(parts), shape[-1], dtype)

    def linear(self, x: Tensor, parts: Parts, shape: Shape, bias: Tensor | None) -> Tensor:
        return self.linears(x, [(parts, shape, bias)])[0]

    def linears(
        self, x: Tensor, maps: Sequence[tuple[Parts, Shape, Tensor | None]]
    ) -> Sequence[Tensor]:
        return quantized_linears(x, [self.matrix(parts, bias) for parts, _, bias in maps])


@dataclass(frozen=True)
class Int8Format(_Integers):
    """8-bit integers with a float32 scale per row."""

    name = "int8"

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        return {"": TensorSpec(shape, torch.int8), "_scale": TensorSpec(shape[:-1], torch.float32)}

    def grains(self, shape: Shape) -> dict[str, Grain]:
        """Return the grain of each part over a matrix: a scale covers a whole row."""
        return {"": Grain(), "_scale": Grain(columns=None)}

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        q, scale = quantize_int8(weight)
        return {"": q, "_scale": scale}


@dataclass(frozen=True)
class Int4Format(_Integers):
    """4-bit integers with a bfloat16 scale per group of 64."""

    name = "int4"

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        packed, scale = int4_shapes(shape)
        return {"": TensorSpec(packed, torch.uint8), "_scale": TensorSpec(scale, torch.bfloat16)}

    def grains(self, shape: Shape) -> dict[str, Grain]:
        return {"": PACKED, "_scale": Grain(columns=PACK)}

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        packed, scale = quantize_int4(weight, gram)
        return {"": packed, "_scale": scale}


@dataclass(frozen=True)
class GroupFormat(_Integers):
    """Integers with a scale, and optionally an offset, per group: `quintet.ops.groups`.

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
        size = "a row" if self.group is None else str(self.group)
        kind = "iq4" if self.iq4 else f"int{self.bits}"
        return f"{kind} by {size}{' with offsets' if self.offset else ''}"

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        numbers = torch.int8 if self.bits == 8 else torch.uint8
        scales = TensorSpec((*shape[:-1], group_count(shape[-1], self.group)), self.dtype)
        specs = {"": TensorSpec(number_shape(shape, self.bits), numbers), self._scale: scales}
        return {**specs, "_offset": scales} if self.offset else specs

    def grains(self, shape: Shape) -> dict[str, Grain]:
        scale = Grain(columns=self.group or max(shape[-1], 1))
        found = {"": Grain() if self.bits == 8 else PACKED, self._scale: scale}
        return {**found, "_offset": scale} if self.offset else found

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        numbers, scale, offset = quantize_groups(
            weight,
            self.bits,
            self.group,
            offset=self.offset,
            dtype=self.dtype,
            iq4=self.iq4,
            gram=gram,
        )
        parts = {"": numbers, self._scale: scale}
        return parts if offset is None else {**parts, "_offset": offset}

    def matrix(self, parts: Parts, bias: Tensor | None = None) -> Matrix:
        return Matrix(parts[""], parts[self._scale], bias, parts.get("_offset"), self.iq4)

    @property
    def _scale(self) -> str:
        # What the numbers mean is seen by the names of what is beside them.
        return "_scale_iq4" if self.iq4 else "_scale"


@dataclass(frozen=True)
class FP8Format(WeightFormat):
    """e4m3 numbers with a scale per block, as DeepSeek-V3 is released.

    Attributes:
        block: rows and columns of a block.
        powers: whether scales are powers of two, as in V3.1.
    """

    name = "fp8"
    block: tuple[int, int] = FP8_BLOCK
    powers: bool = False

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        scales = fp8_scale_shape(shape, self.block)
        return {
            "": TensorSpec(shape, torch.float8_e4m3fn),
            "_scale_inv": TensorSpec(scales, torch.float32),
        }

    def grains(self, shape: Shape) -> dict[str, Grain]:
        return {"": Grain(), "_scale_inv": Grain(*self.block)}

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        q, scale_inv = quantize_fp8(weight, self.block, powers=self.powers)
        return {"": q, "_scale_inv": scale_inv}

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        return dequantize_fp8(parts[""], parts["_scale_inv"], dtype, self.block)

    def matrix(self, parts: Parts, bias: Tensor | None = None) -> Matrix:
        return Matrix(parts[""], parts["_scale_inv"], bias, block=self.block)

    def linears(
        self, x: Tensor, maps: Sequence[tuple[Parts, Shape, Tensor | None]]
    ) -> Sequence[Tensor]:
        return fp8_linears(x, [self.matrix(parts, bias) for parts, _, bias in maps])

    def cuts(self, row: int) -> bool:
        return row % self.block[0] == 0

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts; power-of-two scales may be stored as bytes."""
        scale_inv = found["_scale_inv"]
        # Others are damaged, which `checked` says.
        wide = scale_inv.to(torch.float32) if scale_inv.is_floating_point() else scale_inv
        return {**found, "_scale_inv": wide}
