"""torchao's weight-only formats: int8 files are read, models use our formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from quintet.checkpoint import TensorInfo
from quintet.errors import CheckpointError, ConfigError, UnsupportedModelError, shown
from quintet.ops.quantized import INT4_GROUP
from quintet.quantization.config import Int4Config, Int8Config, QuantizationConfig
from quintet.quantization.formats import Int8Format, Parts, Shape, WeightFormat
from quintet.quantization.scheme import Scheme

INT8 = ("int8_weight_only", "Int8WeightOnlyConfig")
INT4 = ("int4_weight_only", "Int4WeightOnlyConfig")


@dataclass(frozen=True)
class TorchAoInt8Format(Int8Format):
    """The parts of torchao's `Int8Tensor`."""

    name = "torchao int8"

    @property
    def parts_of(self) -> WeightFormat:
        return Int8Format()

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        path = f"{weight.removesuffix('weight')}_weight_"
        scale_shape = (shape[0], 1)
        return {
            "": (path + "qdata", shape),
            "scale": (path + "scale", scale_shape),
            "zero_point": (path + "zero_point", scale_shape),
        }

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: zero is not in the middle.
        """
        if bool(found["zero_point"].any()):
            raise CheckpointError(f"{weight} has a zero_point, which only activations have")
        return {"": found[""], "_scale": found["scale"].view(-1)}


@dataclass(kw_only=True)
class TorchAoConfig(QuantizationConfig):
    """A weight-only configuration of torchao; the package is not needed.

    A model is held in our int8 or int4 instead, and saved as that: int8 is the same format, and
    torchao's int4 comes in layouts of particular devices.

    Attributes:
        quant_type: an `Int8WeightOnlyConfig` or `Int4WeightOnlyConfig` of torchao, its mapping as
            in config.json, or "int8_weight_only" or "int4_weight_only".
        modules_to_not_convert: modules that keep their numbers, beside the output head.
        include_input_output_embeddings: quantise the output head, too.
        untie_embedding_weights: accepted: what is tied stays tied, and is quantised as one.
    """

    quant_method: ClassVar[str] = "torchao"

    quant_type: Any = None
    modules_to_not_convert: list[str] | None = None
    include_input_output_embeddings: bool = False
    untie_embedding_weights: bool = False

    def __post_init__(self) -> None:
        self._require_names("modules_to_not_convert")
        kind, group = _kind(self.quant_type)
        if kind not in (*INT8, *INT4):
            raise UnsupportedModelError(
                f"TorchAoConfig: quant_type={shown(self.quant_type)} is not supported; there are "
                f"{INT8[1]} and {INT4[1]}"
            )
        if group not in ((None,) if kind in INT8 else (None, INT4_GROUP)):
            only = "a scale for each row" if kind in INT8 else f"group_size={INT4_GROUP}"
            raise ConfigError(f"TorchAoConfig: group_size={shown(group)}; {kind} has {only} here")
        self._is_int8 = kind in INT8

    def ours(self) -> Int8Config | Int4Config:
        unquantized = list(self.modules_to_not_convert or ())
        if not self.include_input_output_embeddings:
            unquantized.append("lm_head")
        return (Int8Config if self._is_int8 else Int4Config)(modules_to_not_convert=unquantized)

    def scheme(self) -> Scheme:
        return self.ours().scheme()

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        """Return the file format of a matrix.

        Raises:
            UnsupportedModelError: it is torchao's int4.
        """
        weight_format = TorchAoInt8Format()
        if weight_format.files(weight, shape)[""][0] not in tensors:
            return None
        if not self._is_int8:
            raise UnsupportedModelError(
                f"{weight} is in torchao's int4, whose layout is a particular device's; use a "
                "copy of the model in bfloat16 with quantize='int4'"
            )
        return weight_format


def _kind(quant_type: Any) -> tuple[str, int | None]:
    if isinstance(quant_type, str):
        return quant_type, None
    if isinstance(quant_type, Mapping):
        inner = quant_type.get("default", quant_type)
        data = inner.get("_data", {}) if isinstance(inner, Mapping) else {}
        name = inner.get("_type", "") if isinstance(inner, Mapping) else ""
        return str(name), data.get("group_size") if isinstance(data, Mapping) else None
    values = vars(quant_type) if hasattr(quant_type, "__dict__") else {}
    return type(quant_type).__name__, values.get("group_size")
