"""The formats of compressed-tensors: `weight_packed`, `weight_scale` and so on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import CheckpointError
from quintet.ops.groups import group_count
from quintet.ops.quantized import FP8_BLOCK, bands
from quintet.ops.words import WORD
from quintet.quantization.cutting import Grain
from quintet.quantization.formats import (
    FP8Format,
    Int8Format,
    Parts,
    Shape,
    TensorSpec,
    WeightFormat,
)
from quintet.quantization.grouped import FileFormat, GroupedFormat, finite, numbers_in
from quintet.quantization.mixed import FP8_ROWS

# Of four bits: a sign, two of an exponent, one of a fraction.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class PackedFormat(GroupedFormat):
    """Unsigned integers in 32-bit words along the rows; zero points along the columns.

    Attributes:
        whole: whether there is one scale for all of a matrix.
        present: what else is beside the words.
    """

    name = "compressed-tensors"
    whole: bool = False
    present: tuple[str, ...] = ()

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        *lead, rows, columns = shape
        groups = group_count(columns, self.group)
        zeros: Shape = (*lead, _words(rows, self.bits), groups)
        shapes: dict[str, Shape] = {
            "scale": (-1,) if self.whole else (*lead, rows, groups),
            "zero_point": (-1,) if self.whole else zeros,
            "shape": (-1,),
            "g_idx": (columns,),
        }
        suffixes = ["scale", *self.present, *([] if self.symmetric else ["zero_point"])]
        return {
            "": (f"{weight}_packed", (*lead, rows, _words(columns, self.bits))),
            **{key: (f"{weight}_{key}", shapes[key]) for key in suffixes},
        }

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: they contradict each other, or scales are not finite.
        """
        rows, columns = shape[-2:]
        if "shape" in found and (stored_shape := found["shape"].flatten().tolist()[-2:]) != [
            rows,
            columns,
        ]:
            raise CheckpointError(
                f"{weight}_shape says {stored_shape}, and config.json {[rows, columns]}; check "
                "that it belongs to these weights"
            )
        levels = numbers_in(found[""], self.bits, weight)[..., :columns]
        zero = None if self.symmetric else self._zeros(weight, found["zero_point"], rows)
        scale = _of_rows(found["scale"], shape, weight) if self.whole else found["scale"]
        index = found.get("g_idx")
        if index is not None and bool((index < 0).any()):
            # What was never set.
            index = torch.arange(columns, device=index.device, dtype=torch.long) // (
                self.group or max(columns, 1)
            )
        return self.meant(levels, scale, zero, index, weight)

    def _zeros(self, weight: str, stored: Tensor, rows: int) -> Tensor:
        if self.whole:
            return _zero_point(stored, weight) + self.middle
        return numbers_in(stored.mT, self.bits, weight)[..., :rows].mT


@dataclass(frozen=True)
class IntegersFormat(GroupedFormat):
    """Signed integers, one per byte, with groups or zero points.

    Attributes:
        whole: whether there is one scale for all of a matrix.
    """

    name = "compressed-tensors"
    whole: bool = False

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        scale_shape = (*shape[:-1], group_count(shape[-1], self.group))
        names = ["scale", *([] if self.symmetric else ["zero_point"])]
        return {
            "": (weight, shape),
            **{key: (f"{weight}_{key}", (-1,) if self.whole else scale_shape) for key in names},
        }

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: a dtype that cannot be, or scales that are not finite.
        """
        levels = _signed(found[""], weight).contiguous().view(torch.uint8) ^ self.middle
        scale, zero = found["scale"], None
        if self.whole:
            scale = _of_rows(scale, shape, weight)
        if not self.symmetric:
            read = _zero_point if self.whole else _zero_points
            zero = read(found["zero_point"], weight) + self.middle
        return self.meant(levels, scale, zero, None, weight)


@dataclass(frozen=True)
class RowsFormat(Int8Format):
    """Our int8 with other names of the scales.

    Attributes:
        whole: whether there is one scale for all of a matrix.
    """

    name = "compressed-tensors"
    whole: bool = False

    @property
    def parts_of(self) -> WeightFormat:
        return Int8Format()

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        scale: Shape = (-1,) if self.whole else (*shape[:-1], 1)
        return {"": (weight, shape), "scale": (f"{weight}_scale", scale)}

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: a dtype that cannot be, or scales that are not finite.
        """
        scale = _of_rows(found["scale"], shape, weight) if self.whole else found["scale"]
        return {"": _signed(found[""], weight), "_scale": finite(scale, weight).squeeze(-1)}


@dataclass(frozen=True)
class FP8File(FP8Format):
    """Our FP8 with a scale per matrix, row, or block.

    Attributes:
        whole: whether there is one scale for all of a matrix.
    """

    name = "compressed-tensors"
    whole: bool = False

    @property
    def parts_of(self) -> WeightFormat:
        return FP8Format(self.block)

    @property
    def model_format(self) -> WeightFormat | None:
        return self.parts_of if self.block in (FP8_ROWS, FP8_BLOCK) else None

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        scales = self.parts(shape)["_scale_inv"].shape
        return {"": (weight, shape), "scale": (f"{weight}_scale", (-1,) if self.whole else scales)}

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: scales that are not finite.
        """
        scale = _power_of_two(found["scale"])
        scale = _of_rows(scale, shape, weight) if self.whole else scale
        return {"": found[""], "_scale_inv": finite(scale, weight)}


@dataclass(frozen=True)
class FP4Format(FileFormat):
    """NVFP4 and MXFP4: two e2m1 numbers per byte, one scale per 16 or 32 numbers.

    Attributes:
        group: how many have a scale.
        globally: whether another scale, of all of a matrix, divides.
    """

    name = "fp4"
    group: int
    globally: bool

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        *lead, columns = shape
        scales = TensorSpec((*lead, group_count(columns, self.group)), torch.float32)
        return {"": TensorSpec((*lead, -(-columns // 2)), torch.uint8), "_scale": scales}

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        parts = self.parts(shape)
        whole = {"global": (f"{weight}_global_scale", (-1,))} if self.globally else {}
        return {
            "": (f"{weight}_packed", parts[""].shape),
            "scale": (f"{weight}_scale", parts["_scale"].shape),
            **whole,
        }

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: scales that are not finite, or a global one that cannot divide.
        """
        if found[""].dtype != torch.uint8:
            raise CheckpointError(f"{weight} is packed in {found[''].dtype}, not in uint8")
        scale = finite(_power_of_two(found["scale"]), weight)
        if self.globally:
            divisor = finite(found["global"], weight)
            if divisor.numel() != _lead(shape) or bool((divisor == 0).any()):
                raise CheckpointError(
                    f"{weight}_global_scale has to be a number that is not 0, for each matrix"
                )
            scale = scale / divisor.reshape(*shape[:-2], 1, 1)
        return {"": found[""], "_scale": scale}

    def cuts(self, row: int) -> bool:
        return True

    def grains(self, shape: Shape) -> dict[str, Grain]:
        return {"": Grain(columns=2, packed=True), "_scale": Grain(columns=self.group)}

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        packed, columns = parts[""], shape[-1]
        table = torch.tensor(
            (*E2M1, *(-x for x in E2M1)), device=packed.device, dtype=torch.float32
        )
        decoded = torch.empty(*packed.shape[:-1], columns, dtype=dtype, device=packed.device)
        scales = parts["_scale"].reshape(-1, parts["_scale"].shape[-1])
        for rows, target, row_scale in zip(
            bands(packed.reshape(-1, packed.shape[-1]), columns),
            bands(decoded.view(-1, columns)),
            bands(scales, columns),
            strict=True,
        ):
            places = torch.stack((rows & 15, rows >> 4), dim=-1).flatten(-2)[:, :columns]
            along = row_scale.repeat_interleave(self.group, dim=-1)[:, :columns]
            target.copy_(table[places.to(torch.int64)] * along)
        return decoded


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD)


def _lead(shape: Shape) -> int:
    return torch.Size(shape[:-2]).numel()


def _of_rows(scale: Tensor, shape: Shape, weight: str) -> Tensor:
    """Expand a matrix's scale to one per row, (..., O, 1)."""
    if scale.numel() != _lead(shape):
        raise CheckpointError(
            f"{weight}_scale has {scale.numel()} scales, and has to have one for the matrix, as "
            "strategy='tensor' says"
        )
    return scale.reshape(*shape[:-2], 1, 1).expand(*shape[:-1], 1)


def _power_of_two(scale: Tensor) -> Tensor:
    """Return scales as numbers; uint8 ones are exponents."""
    return torch.exp2(scale.to(torch.float32) - 127) if scale.dtype == torch.uint8 else scale


def _signed(numbers: Tensor, weight: str) -> Tensor:
    if numbers.dtype != torch.int8:
        raise CheckpointError(
            f"{weight} is {numbers.dtype}, and has to be int8; fetch the file again"
        )
    return numbers


def _zero_point(zero: Tensor, weight: str) -> Tensor:
    """Return the zero point of all of a matrix, (1, 1)."""
    if zero.numel() != 1:
        raise CheckpointError(
            f"{weight} has {zero.numel()} zero points, and has to have one for the matrix, as "
            "strategy='tensor' says"
        )
    return _zero_points(zero, weight).reshape(1, 1)


def _zero_points(zero: Tensor, weight: str) -> Tensor:
    if zero.is_floating_point() or zero.dtype.itemsize > 4:
        raise CheckpointError(f"{weight} has zero points of {zero.dtype}, which have to be int8")
    return zero.to(torch.int32)
