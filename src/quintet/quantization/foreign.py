"""What is common to the files of other programs: they are read, and a model is held in our own."""

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
    """How files of another program are; a model becomes it by no `quantization_config`."""

    @abstractmethod
    def usual(self) -> WeightFormat | None:
        """Return the format that most matrices are held in; None for plain numbers."""

    def scheme(self) -> Scheme | None:
        """Return the formats of a model, as far as they are known without its files."""
        usual = self.usual()
        return None if usual is None else Scheme(usual)

    def ours(self) -> "MixedConfig":
        """Return the configuration that a model of such files is held and saved by."""
        return MixedConfig()

    def _require_group(self, key: str) -> None:
        value = getattr(self, key)
        self._require(type(value) is int and (value == -1 or value > 0), key, "positive, or -1")

    def _require_true_or_false(self, *keys: str) -> None:
        for key in keys:
            self._require(isinstance(getattr(self, key), bool), key, "true or false")


def dtype_of(tensors: Mapping[str, TensorInfo], name: str) -> torch.dtype:
    """Return the dtype of scales; what is wrong with them is said when they are read."""
    found = tensors.get(name)
    return found.dtype if found is not None and found.dtype.is_floating_point else torch.float16


def filled_up(count: int, unit: int) -> int:
    """Return the next multiple of a unit."""
    return -(-count // unit) * unit


def group_or_all(size: int) -> int | None:
    """Return the columns of a group; None, for all, where files say -1."""
    return None if size == -1 else size
