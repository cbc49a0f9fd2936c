"""Integers packed as compressed-tensors, for vLLM and Transformers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quintet.checkpoint import TensorInfo
from quintet.errors import InputError, UnsupportedModelError
from quintet.kernels.matrix import Matrix
from quintet.ops.groups import PACK, unpack_numbers
from quintet.ops.words import pack_words
from quintet.quantization.config import QuantizationConfig
from quintet.quantization.cutting import Grain
from quintet.quantization.formats import (
    GroupFormat,
    Int4Format,
    Int8Format,
    Parts,
    Shape,
    TensorSpec,
    WeightFormat,
)
from quintet.quantization.scheme import Scheme

# They are read from numbers where they are, whatever the rest of a model has.
ENDS = ("lm_head.weight", "embed_tokens.weight")


@dataclass(frozen=True)
class WordsFormat(WeightFormat):
    """One of our formats in memory, 32-bit words on disk.

    Attributes:
        inner: symmetric integers: int8, int4, or groups without offsets.
    """

    inner: WeightFormat

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def bits(self) -> int:
        """Bits per integer."""
        if isinstance(self.inner, GroupFormat):
            return self.inner.bits
        return 4 if isinstance(self.inner, Int4Format) else 8

    @property
    def group(self) -> int | None:
        """The group size; None for a row."""
        if isinstance(self.inner, GroupFormat):
            return self.inner.group
        return PACK if isinstance(self.inner, Int4Format) else None

    @property
    def parts_of(self) -> WeightFormat:
        return self.inner

    def parts(self, shape: Shape) -> dict[str, TensorSpec]:
        return self.inner.parts(shape)

    def encode(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        return self.inner.encode(weight, gram)

    def decode(self, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        return self.inner.decode(parts, shape, dtype)

    def grains(self, shape: Shape) -> dict[str, Grain] | None:
        return self.inner.grains(shape)

    def cuts(self, row: int) -> bool:
        return self.inner.cuts(row)

    def matrix(self, parts: Parts, bias: Tensor | None = None) -> Matrix | None:
        """Return parts, or stacks of them, as kernels read them."""
        return self.inner.matrix(parts, bias)

    def linears(
        self, x: Tensor, maps: Sequence[tuple[Parts, Shape, Tensor | None]]
    ) -> Sequence[Tensor]:
        return self.inner.linears(x, maps)

    def pack(
        self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        numbers = parts[""]
        levels = (
            unpack_numbers(numbers, shape[-1])
            if self.bits == 4
            else numbers.contiguous().view(torch.uint8) ^ 128
        )
        scale = parts["_scale"]
        return {
            f"{weight}_packed": pack_words(levels, self.bits),
            f"{weight}_scale": scale if scale.ndim == len(shape) else scale.unsqueeze(-1),
            f"{weight}_shape": torch.tensor(shape, dtype=torch.long, device="cpu"),
        }


@dataclass(kw_only=True)
class PackedConfig(QuantizationConfig):
    """A model's integers as compressed-tensors' `pack-quantized`, for `convert` to write.

    Attributes:
        bits: 4 by 64, or 8 by rows, rounded anew; None for those that a model is held in.
        modules_to_not_convert: modules that keep their numbers, beside embedding and head.
    """

    quant_method: ClassVar[str] = "compressed-tensors"

    bits: int | None = None
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self._require(self.bits in (None, 4, 8), "bits", "4, 8 or None")
        self._require_names("modules_to_not_convert")

    def scheme(self) -> Scheme | None:
        """Return the model's formats, or None if only its files know."""
        inner = {4: Int4Format(), 8: Int8Format()}.get(self.bits or 0)
        skip = tuple(self.modules_to_not_convert or ())
        return None if inner is None else Scheme(WordsFormat(inner), None, skip)

    def scheme_of(self, formats: Mapping[str, WeightFormat]) -> Scheme | None:
        """Return the formats of a model, given those its files would be held in, by its names.

        Raises:
            InputError: they are plain numbers.
            UnsupportedModelError: a format that those words do not say.
        """
        if self.bits is not None:
            return self.scheme()
        word_formats = {n: _words_of(n, one) for n, one in formats.items() if not n.endswith(ENDS)}
        if not word_formats:
            raise InputError(
                "the model is not in integers yet, which compressed-tensors would be written of; "
                "use `quintet quantize MODEL DIRECTORY --to w4a16`, or w8a16"
            )
        return Scheme(None, formats=word_formats, skip=tuple(self.modules_to_not_convert or ()))

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        """Return None: `CompressedTensorsConfig` reads the written files."""
        return None

    def described(
        self, quantised: Mapping[str, tuple[WeightFormat, Shape]], plain: Iterable[str]
    ) -> dict[str, Any]:
        """Return the content for `config.json`, given the format of each weight.

        Raises:
            InputError: rows that no whole groups make.
        """
        kinds: Counter[tuple[int, int | None]] = Counter()
        for name, (one, shape) in quantised.items():
            assert isinstance(one, WordsFormat)
            if one.group is not None and shape[-1] % one.group:
                raise InputError(
                    f"{name} has rows of {shape[-1]} numbers, which are no whole groups of "
                    f"{one.group}, as compressed-tensors needs them; keep that module with --keep, "
                    "or use --to w8a16"
                )
            kinds[one.bits, one.group] += 1
        groups = {}
        for number, ((bits, group), _) in enumerate(kinds.most_common()):
            targets = ["Linear"] if number == 0 else []
            for name, (one, _) in quantised.items() if number else ():
                assert isinstance(one, WordsFormat)
                targets += [_path(name)] if (one.bits, one.group) == (bits, group) else []
            groups[f"group_{number}"] = {
                "targets": targets,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if group is None else "group",
                    "group_size": group,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": self.quant_method,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(_path(name) for name in plain),
            "kv_cache_scheme": None,
        }


def _path(weight: str) -> str:
    return weight.removesuffix(".weight")


def _words_of(name: str, weight_format: WeightFormat) -> WordsFormat:
    groups = (
        isinstance(weight_format, GroupFormat)
        and not weight_format.offset
        and not weight_format.iq4
    )
    if not groups and not isinstance(weight_format, Int8Format | Int4Format):
        raise UnsupportedModelError(
            f"{name} is held as {weight_format.name}, which compressed-tensors' packed integers do "
            "not say; round it anew: `quintet quantize MODEL DIRECTORY --to w4a16`, or w8a16"
        )
    return WordsFormat(weight_format)
