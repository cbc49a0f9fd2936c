"""FP8 with a scale per matrix or row, as AutoFP8 and vLLM write it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from quintet.checkpoint import TensorInfo
from quintet.quantization.compressed_formats import FP8File
from quintet.quantization.foreign import FileConfig
from quintet.quantization.formats import Shape, WeightFormat
from quintet.quantization.mixed import FP8_ROWS

IDLE = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")


def is_whole(values: Mapping[str, Any]) -> bool:
    """Return whether quant_method="fp8" means these files, not blocks."""
    if values.get("weight_block_size") is not None:
        return False
    static = values.get("activation_scheme") == "static"
    return static or "ignored_layers" in values or "weight_block_size" in values


@dataclass(kw_only=True)
class WholeFP8Config(FileConfig):
    """FP8 files with a scale per matrix or row; activation settings are ignored.

    Attributes:
        activation_scheme: "static" or "dynamic".
    """

    quant_method: ClassVar[str] = "fp8"

    activation_scheme: str = "dynamic"

    def __post_init__(self) -> None:
        self._require(
            self.activation_scheme in ("static", "dynamic"),
            "activation_scheme",
            "'static' or 'dynamic'",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a mapping.

        Raises:
            ConfigError: a value is not usable.
        """
        return cls(activation_scheme=values.get("activation_scheme", "dynamic"))

    def usual(self) -> WeightFormat | None:
        return FP8File(FP8_ROWS).model_format

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        found, scale = tensors.get(weight), tensors.get(f"{weight}_scale")
        if found is None or found.dtype != torch.float8_e4m3fn:
            return None
        return FP8File(FP8_ROWS, whole=scale is None or math.prod(scale.shape) == 1)

    def idle(self, name: str) -> bool:
        return name.endswith(IDLE)
