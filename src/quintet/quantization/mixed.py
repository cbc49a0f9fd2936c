"""Our formats side by side, for models read from other programs' files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quintet.checkpoint import TensorInfo
from quintet.ops.quantized import FP8_BLOCK
from quintet.quantization.config import QuantizationConfig
from quintet.quantization.formats import FP8Format, Shape, WeightFormat
from quintet.quantization.own import integers_of
from quintet.quantization.scheme import Scheme

# A scale for each row, however long: no matrix is as wide.
FP8_ROWS = (1, 2**16)
FORMATS: tuple[WeightFormat, ...] = (FP8Format(FP8_ROWS), FP8Format(FP8_BLOCK))


@dataclass(kw_only=True)
class MixedConfig(QuantizationConfig):
    """One of our formats, or plain numbers, per matrix, following its file.

    What somebody else's files become where one of our formats says the same: a model is held in
    it, and saved in it.
    """

    quant_method: ClassVar[str] = "quintet"

    def scheme(self) -> None:
        """Return None: only the files know the formats."""

    def scheme_of(self, formats: Mapping[str, WeightFormat]) -> Scheme | None:
        """Return the formats of a model, given those its files would be held in, by its names."""
        return Scheme(None, formats=formats) if formats else None

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        integers = integers_of(weight, shape, tensors)
        if integers is not None:
            return integers
        found = tensors.get(weight)
        if found is None or (found.dtype.is_floating_point and found.dtype.itemsize > 1):
            return None
        alike = [one for one in FORMATS if one.parts(shape)[""].dtype == found.dtype]
        for one in alike:
            files = one.files(weight, shape).values()
            if all(name in tensors and tensors[name].shape == wanted for name, wanted in files):
                return one
        return alike[0] if alike else None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "bits": None, "group_size": None}
