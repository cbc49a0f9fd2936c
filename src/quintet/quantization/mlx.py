"""MLX's quantisation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quintet.checkpoint import TensorInfo
from quintet.errors import ConfigError, shown
from quintet.ops.groups import group_count
from quintet.ops.words import WORD
from quintet.quantization.foreign import ELSEWHERE, FileConfig, dtype_of
from quintet.quantization.formats import GroupFormat, Parts, Shape, WeightFormat
from quintet.quantization.grouped import GroupedFormat, finite, numbers_in

# What may be a module's own in the mapping, beside what is of all of them.
COMMON = ("group_size", "bits", "mode", "quant_method", "quantize_input")


@dataclass(frozen=True)
class MLXFormat(GroupedFormat):
    """32-bit words along the rows, with offsets (MLX's biases)."""

    name = "MLX"

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        *lead, columns = shape
        path, groups = weight.removesuffix("weight"), (*lead, group_count(columns, self.group))
        return {
            "": (weight, (*lead, -(-columns * self.bits // WORD))),
            "scales": (path + "scales", groups),
            "biases": (path + "biases", groups),
        }

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: scales or offsets that are not finite.
        """
        levels = numbers_in(found[""], self.bits, weight)[..., : shape[-1]]
        scale, offset = (finite(found[name], weight) for name in ("scales", "biases"))
        return {"": levels, "_scale": scale, "_offset": offset}

    @property
    def model_format(self) -> WeightFormat | None:
        # Around the middle of 8 bits, an offset is a sum with more digits than it has in the file.
        return GroupFormat(
            self.bits, self.group, True, self.dtype if self.bits == 4 else torch.float32
        )


@dataclass(kw_only=True)
class MLXConfig(FileConfig):
    """MLX files: the `quantization` key of their config.json.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share a scale and an offset: 32, 64 or 128.
        mode: "affine".
        modules: what single modules have instead, by their paths.
    """

    quant_method: ClassVar[str] = "mlx"

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"
    modules: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _checked(self.bits, self.group_size, self.mode)
        self._own = {}
        for path, own in self.modules.items():
            if isinstance(own, Mapping):
                settings = {
                    "bits": self.bits,
                    "group_size": self.group_size,
                    "mode": self.mode,
                    **own,
                }
                self._own[path] = _checked(
                    settings["bits"], settings["group_size"], settings["mode"]
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping, whose keys include module paths.

        Raises:
            ConfigError: a value is not usable.
        """
        common = {k: values[k] for k in ("bits", "group_size", "mode") if values.get(k) is not None}
        modules = {k: v for k, v in values.items() if k not in COMMON}
        return cls(**common, modules=modules)

    def usual(self) -> WeightFormat | None:
        return MLXFormat(self.bits, self.group_size, False, dtype=torch.bfloat16).model_format

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        path = weight.removesuffix("weight")
        found = tensors.get(weight)
        whole = found is not None and not found.dtype.is_floating_point
        if not whole and path + "scales" not in tensors:
            return None
        # What it calls the stack of all experts is named for each of them.
        named = _in_stack(path.rstrip("."))
        bits, group = self._own.get(named, (self.bits, self.group_size))
        return MLXFormat(bits, group, False, dtype=dtype_of(tensors, path + "scales"))


def _in_stack(path: str) -> str:
    before, experts, after = path.partition(".experts.")
    return f"{before}.switch_mlp.{after.partition('.')[2]}" if experts else path


def _checked(bits: Any, group: Any, mode: Any) -> tuple[int, int]:
    for key, value, values in (
        ("bits", bits, (4, 8)),
        ("group_size", group, (32, 64, 128)),
        ("mode", mode, ("affine",)),
    ):
        if value not in values or isinstance(value, bool | float):
            raise ConfigError(
                f"MLXConfig: {key}={shown(value)} has to be one of "
                f"{', '.join(map(str, values))}; {ELSEWHERE}"
            )
    return bits, group
