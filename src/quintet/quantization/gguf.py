"""GGUF formats: read from files, converted to ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from quintet.checkpoint import TensorInfo
from quintet.errors import CheckpointError, InputError
from quintet.gguf import BlockType
from quintet.gguf.layouts import LAYOUTS
from quintet.gguf.types import BY_NAME
from quintet.ops.blocks import decode_blocks, has_odd_scales, split_blocks
from quintet.quantization.config import QuantizationConfig
from quintet.quantization.cutting import Grain
from quintet.quantization.formats import (
    GroupFormat,
    Int8Format,
    Parts,
    Shape,
    TensorSpec,
    WeightFormat,
)
from quintet.quantization.mixed import MixedConfig
from quintet.quantization.scheme import Scheme


@dataclass(frozen=True)
class BlockFormat(WeightFormat):
    """GGUF blocks of neighbouring weights of a row; read-only.

    Attributes:
        kind: the type of the blocks.
    """

    name = "gguf"
    kind: BlockType

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        row = shape[-1] // self.kind.weights * self.kind.nbytes
        return {"": TensorSpec((*shape[:-1], row), torch.uint8)}

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        """Raise: models use other formats.

        Raises:
            InputError: always.
        """
        raise InputError(f"a model cannot be held in {self.kind.name}, but be read from it")

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the blocks stand for."""
        return decode_blocks(parts[""], self.kind, dtype)

    def cuts(self, row: int) -> bool:
        return True

    def grains(self, shape: Shape) -> dict[str, Grain]:
        return {"": Grain(columns=self.kind.weights, width=self.kind.nbytes, packed=True)}

    @property
    def groups(self) -> GroupFormat:
        """Our equivalent format."""
        layout = LAYOUTS[self.kind.name]
        dtype = torch.float32 if layout.two_levels else torch.float16
        return GroupFormat(layout.bits, layout.group, layout.offset, dtype, layout.table)

    def recast(self, parts: Parts, shape: Shape, to: WeightFormat) -> dict[str, Tensor] | None:
        ours = self.groups
        if ours.parts(shape) != to.parts(shape) or to.parts_of != ours:
            return None
        found = zip(ours.parts(shape), split_blocks(parts[""], self.kind), strict=False)
        return {suffix: part for suffix, part in found if part is not None}

    @property
    def model_format(self) -> GroupFormat:
        """The format a model uses for these blocks."""
        return self.groups

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        """Return name and shape of the one tensor on disk."""
        return {"": (weight, shape)}

    def checked(self, weight: str, parts: Parts, shape: Shape) -> Parts:
        """Return blocks, or a process's part of them, if they can be decoded.

        Raises:
            CheckpointError: a scale is not finite.
        """
        if has_odd_scales(parts[""], self.kind):
            raise CheckpointError(
                f"{weight} has blocks of {self.kind.name} with a scale that is not finite; the "
                "file is damaged, fetch it again"
            )
        return parts


@dataclass(frozen=True)
class KeysAndValuesFormat(WeightFormat):
    """kv_b_proj as two tensors, for keys (H, R, Dn) and values (H, Dv, R).

    Attributes:
        keys: the blocks of the one; None for plain numbers.
        values: those of the other.
        shapes: of the two.
    """

    name = "gguf"
    keys: BlockType | None
    values: BlockType | None
    shapes: tuple[Shape, Shape]

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Raise: no model uses it."""
        raise InputError("keys and values in a tensor each are no format of a model")

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        """Raise: a model holds the map unquantised.

        Raises:
            InputError: always.
        """
        raise InputError("keys and values in a tensor each are no format of a model")

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the map (H · (Dn + Dv), R), keys first in each head."""
        keys = _numbers(parts[""], self.keys, dtype)
        values = _numbers(parts["values"], self.values, dtype)
        return torch.cat((keys.transpose(1, 2), values), dim=1).reshape(shape)

    @property
    def model_format(self) -> None:
        """None: a model holds the map unquantised."""

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        keys, values = _halves(weight)
        return {"": (keys, self.shapes[0]), "values": (values, self.shapes[1])}

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts.

        Raises:
            CheckpointError: a scale is not finite, or they are halves of another map.
        """
        (heads, rank, size), (count, height, width) = self.shapes
        if (heads, rank) != (count, width) or (heads * (size + height), rank) != shape:
            raise CheckpointError(
                f"{weight} {list(shape)} is made of keys {list(self.shapes[0])} and values "
                f"{list(self.shapes[1])}, which do not fit each other"
            )
        for key, kind in (("", self.keys), ("values", self.values)):
            if kind is not None and has_odd_scales(found[key], kind):
                raise CheckpointError(
                    f"{weight} has blocks of {kind.name} with a scale that is not finite; the file "
                    "is damaged, fetch it again"
                )
        return dict(found)

    def checked(self, weight: str, parts: Parts, shape: Shape) -> Parts:
        """Return the parts, which `unpack` has checked."""
        return parts


def _numbers(part: Tensor, kind: BlockType | None, dtype: torch.dtype) -> Tensor:
    return part.to(dtype) if kind is None else decode_blocks(part, kind, dtype)


def _halves(weight: str) -> tuple[str, str]:
    stem = weight.removesuffix("kv_b_proj.weight")
    return f"{stem}k_b_proj.weight", f"{stem}v_b_proj.weight"


@dataclass(kw_only=True)
class GGUFConfig(QuantizationConfig):
    """The quantisation of a GGUF file; models use our formats.

    Attributes:
        types: how many tensors the file has of each type.
    """

    quant_method: ClassVar[str] = "gguf"

    types: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._require(isinstance(self.types, dict), "types", "a mapping from types to counts")

    def scheme(self) -> Scheme | None:
        """Return the model's approximate formats; the files decide."""
        blocks = any(BY_NAME[name].weights > 1 for name in self.types if name in BY_NAME)
        return Scheme(Int8Format(), Int8Format()) if blocks else None

    def ours(self) -> MixedConfig:
        return MixedConfig()

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        if (found := tensors.get(weight)) is not None:
            return None if found.blocks is None else BlockFormat(found.blocks)
        keys, values = (tensors.get(name) for name in _halves(weight))
        if not weight.endswith("kv_b_proj.weight") or keys is None or values is None:
            return None
        if len(keys.shape) != 3 or len(values.shape) != 3:
            return None
        return KeysAndValuesFormat(keys.blocks, values.blocks, (keys.shape, values.shape))

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "types": dict(self.types)}
