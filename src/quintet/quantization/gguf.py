"""The formats of GGUF files: they are read, and a model is held in ours."""

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
    """Blocks of neighbouring weights of a row; they are read and never made.

    Attributes:
        kind: the type of the blocks.
    """

    name = "gguf"
    kind: BlockType

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        """Return shape and dtype of each part of a matrix of `shape`."""
        row = shape[-1] // self.kind.weights * self.kind.nbytes
        return {"": TensorSpec((*shape[:-1], row), torch.uint8)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Refuse: a model is held in other formats.

        Raises:
            InputError: always.
        """
        raise InputError(f"a model cannot be held in {self.kind.name}, but be read from it")

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the blocks stand for."""
        return decode_blocks(parts[""], self.kind, dtype)

    def cuts(self, row: int) -> bool:
        """Tell whether the parts, cut there too, are those of the matrix cut before a row."""
        return True

    def grains(self, shape: Shape) -> dict[str, Grain]:
        """Return how each part lies over a matrix of `shape`."""
        return {"": Grain(columns=self.kind.weights, width=self.kind.nbytes, packed=True)}

    @property
    def groups(self) -> GroupFormat:
        """The format of ours that says exactly the same."""
        layout = LAYOUTS[self.kind.name]
        dtype = torch.float32 if layout.two_levels else torch.float16
        return GroupFormat(layout.bits, layout.group, layout.offset, dtype, layout.table)

    def recast(self, parts: Parts, shape: Shape, to: WeightFormat) -> dict[str, Tensor] | None:
        """Return the parts in another format if that is no rounding; None if it would be one."""
        ours = self.groups
        if ours.parts(shape) != to.parts(shape) or to.parts_of != ours:
            return None
        found = zip(ours.parts(shape), split_blocks(parts[""], self.kind), strict=False)
        return {suffix: part for suffix, part in found if part is not None}

    @property
    def held(self) -> GroupFormat:
        """The format in which a model holds what a file holds in blocks."""
        return self.groups

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        """Return name and shape of the tensor on disk: those of the weights."""
        return {"": (weight, shape)}

    def checked(self, weight: str, parts: Parts) -> Parts:
        """Return blocks, or what a process has of them, if numbers can be made of them.

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
    """The map from a latent to keys and values, in a tensor each: (H, R, Dn) and (H, Dv, R).

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
        """Refuse: no model is held in it; see `encode`."""
        raise InputError("keys and values in a tensor each are no format of a model")

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Refuse: a model holds the map as plain numbers.

        Raises:
            InputError: always.
        """
        raise InputError("keys and values in a tensor each are no format of a model")

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the map (H · (Dn + Dv), R): of each head the keys' rows, then the values'."""
        keys = _numbers(parts[""], self.keys, dtype)
        values = _numbers(parts["values"], self.values, dtype)
        return torch.cat((keys.transpose(1, 2), values), dim=1).reshape(shape)

    @property
    def held(self) -> None:
        """None: a model holds the map as plain numbers."""

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        """Return, for each tensor on disk, its name and shape."""
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


def _numbers(part: Tensor, kind: BlockType | None, dtype: torch.dtype) -> Tensor:
    return part.to(dtype) if kind is None else decode_blocks(part, kind, dtype)


def _halves(weight: str) -> tuple[str, str]:
    stem = weight.removesuffix("kv_b_proj.weight")
    return f"{stem}k_b_proj.weight", f"{stem}v_b_proj.weight"


@dataclass(kw_only=True)
class GGUFConfig(QuantizationConfig):
    """What a GGUF file holds; a model of it is held, and saved, in Quintet's formats.

    Attributes:
        types: how many tensors the file has of each type.
    """

    quant_method: ClassVar[str] = "gguf"

    types: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._require(isinstance(self.types, dict), "types", "a mapping from types to counts")

    def scheme(self) -> Scheme | None:
        """Return about what the formats of a model are; which they are is said by files alone."""
        blocks = any(BY_NAME[name].weights > 1 for name in self.types if name in BY_NAME)
        return Scheme(Int8Format(), Int8Format()) if blocks else None

    def ours(self) -> MixedConfig:
        """Return the configuration that a model of such files is held and saved by."""
        return MixedConfig()

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        """Return the format a file holds a matrix in; None for plain numbers."""
        if (found := tensors.get(weight)) is not None:
            return None if found.blocks is None else BlockFormat(found.blocks)
        keys, values = (tensors.get(name) for name in _halves(weight))
        if not weight.endswith("kv_b_proj.weight") or keys is None or values is None:
            return None
        if len(keys.shape) != 3 or len(values.shape) != 3:
            return None
        return KeysAndValuesFormat(keys.blocks, values.blocks, (keys.shape, values.shape))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return {"quant_method": self.quant_method, "types": dict(self.types)}
