"""AWQ (arXiv:2306.00978), as AutoAWQ packs it for matrix products ("gemm")."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quintet.checkpoint import TensorInfo
from quintet.errors import UnsupportedModelError
from quintet.ops.groups import group_count
from quintet.ops.words import WORD
from quintet.quantization.foreign import ELSEWHERE, FileConfig, dtype_of, group_or_all
from quintet.quantization.formats import Parts, Shape, WeightFormat
from quintet.quantization.grouped import GroupedFormat, numbers_in

# Where in a word each of eight columns is.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AWQFormat(GroupedFormat):
    """32-bit words along the outputs, eight numbers each in AWQ's order."""

    name = "AWQ"

    def files(self, weight: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        (rows, columns), path = shape, weight.removesuffix("weight")
        words, groups = rows * self.bits // WORD, group_count(columns, self.group)
        zeros = {} if self.symmetric else {"qzeros": (path + "qzeros", (groups, words))}
        return {
            "": (path + "qweight", (columns, words)),
            **zeros,
            "scales": (path + "scales", (groups, rows)),
        }

    def unpack(self, weight: str, found: Parts, shape: Shape) -> dict[str, Tensor]:
        """Return the parts, given the tensors on disk.

        Raises:
            CheckpointError: scales that are not finite.
        """
        zero = None if self.symmetric else _columns(found["qzeros"], self.bits, weight)
        levels = _columns(found[""], self.bits, weight)
        return self.meant(levels, found["scales"].mT, zero, None, weight)


@dataclass(kw_only=True)
class AWQConfig(FileConfig):
    """AWQ files; settings that do not affect reading are accepted.

    Attributes:
        bits: 4.
        group_size: inputs that share a scale; -1 for all.
        zero_point: whether there are zero points; without, zero is in the middle.
        version: "gemm", of which there are files for every device.
    """

    quant_method: ClassVar[str] = "awq"

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    version: str = "gemm"

    def __post_init__(self) -> None:
        self._require(type(self.bits) is int and self.bits == 4, "bits", f"4; {ELSEWHERE}")
        self._require_group("group_size")
        self._require_true_or_false("zero_point")
        self._require(
            isinstance(self.version, str) and self.version.lower() == "gemm",
            "version",
            f"gemm: others are packed for a particular kernel; {ELSEWHERE}",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a mapping, in either vintage of its names.

        Raises:
            ConfigError: a value is not usable.
        """
        names = {"w_bit": "bits", "q_group_size": "group_size"}
        given = {names.get(key, key): value for key, value in values.items()}
        known = ("bits", "group_size", "zero_point", "version")
        return cls(**{k: v for k, v in given.items() if k in known and v is not None})

    def usual(self) -> WeightFormat | None:
        return self._format(torch.float16).model_format

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        path = weight.removesuffix("weight")
        is_stored = any(path + name in tensors for name in ("qweight", "scales"))
        if not is_stored or len(shape) != 2:
            return None
        self._check_layout(weight, shape, tensors.get(path + "scales"))
        return self._format(dtype_of(tensors, path + "scales"))

    def _check_layout(self, weight: str, shape: Shape, scales: TensorInfo | None) -> None:
        """Check that scales lie along the outputs; in files without a version, they may not.

        Raises:
            UnsupportedModelError: they lie along the inputs.
        """
        groups = group_count(shape[-1], group_or_all(self.group_size))
        found = None if scales is None else scales.shape
        if found and found != (groups, shape[0]) and found[0] == shape[0]:
            raise UnsupportedModelError(
                f"{weight} has scales of the shape {list(found)} where version='gemm' has "
                f"{[groups, shape[0]]}: it is packed for a particular kernel, as version='gemv' "
                f"says; {ELSEWHERE}"
            )

    def idle(self, name: str) -> bool:
        return not self.zero_point and name.endswith(".qzeros")

    def _format(self, dtype: torch.dtype) -> AWQFormat:
        return AWQFormat(self.bits, group_or_all(self.group_size), not self.zero_point, dtype=dtype)


def _columns(words: Tensor, bits: int, weight: str) -> Tensor:
    """Unpack words (N, O · bits / 32) to (O, N)."""
    numbers = torch.unflatten(numbers_in(words, bits, weight), -1, (-1, len(PLACES)))
    return numbers[..., PLACES].flatten(-2).mT.contiguous()
