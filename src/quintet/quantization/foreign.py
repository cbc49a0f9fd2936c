"""Base of configs for other programs' files, which are only read."""

from abc import abstractmethod
from collections.abc import Mapping

import torch

from quintet.checkpoint import TensorInfo
from quintet.quantization.config import QuantizationConfig
from quintet.quantization.formats import WeightFormat
from quintet.quantization.mixed import MixedConfig
from quintet.quantization.scheme import Scheme

ELSEWHERE = "use another release of the model, or one in bfloat16 with quantize='int4'"


class FileConfig(QuantizationConfig):
    """The config of another program's files; models are held in our formats."""

    @abstractmethod
    def usual(self) -> WeightFormat | None:
        """Return the format of most matrices; None for plain numbers."""

    def scheme(self) -> Scheme | None:
        """Return the model's formats, as far as known without the files."""
        usual = self.usual()
        return None if usual is None else Scheme(usual)

    def ours(self) -> "MixedConfig":
        return MixedConfig()

    def _require_group(self, key: str) -> None:
        value = getattr(self, key)
        self._require(type(value) is int and (value == -1 or value > 0), key, "positive, or -1")

    def _require_true_or_false(self, *keys: str) -> None:
        for key in keys:
            self._require(isinstance(getattr(self, key), bool), key, "true or false")


def dtype_of(tensors: Mapping[str, TensorInfo], name: str) -> torch.dtype:
    """Return the dtype of scales; they are validated when read."""
    found = tensors.get(name)
    return found.dtype if found is not None and found.dtype.is_floating_point else torch.float16


def filled_up(count: int, unit: int) -> int:
    """Round up to a multiple of `unit`."""
    return -(-count // unit) * unit


def group_or_all(size: int) -> int | None:
    """Return the group size; -1 in files means all columns."""
    return None if size == -1 else size
