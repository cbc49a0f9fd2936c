"""Quantisation configs: the caller's request, and `quantization_config` in config.json."""

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from quintet.checkpoint import TensorInfo
from quintet.configuration.base import FLOAT_DTYPES
from quintet.errors import ConfigError, InputError, shown
from quintet.ops.quantized import FP8_BLOCK
from quintet.quantization.bitsandbytes import CodesFormat, RowwiseFormat, block_size
from quintet.quantization.formats import (
    FP8Format,
    GroupFormat,
    Int4Format,
    Int8Format,
    Shape,
    WeightFormat,
)
from quintet.quantization.own import integers_of
from quintet.quantization.scheme import Scheme

Tensors = Mapping[str, TensorInfo]
# A scale is repeated for all of its block, also where a matrix ends before that.
MOST_OF_A_BLOCK = 2**16


@dataclass(kw_only=True)
class QuantizationConfig(ABC):
    """A way to quantise a model; also the content of `quantization_config`.

    Attributes:
        modules_to_not_convert: modules that keep their numbers. A name stands for every path that
            has it as a part, or these parts in a row: "lm_head", "layers.0", "mlp.down_proj".
    """

    quant_method: ClassVar[str]

    @abstractmethod
    def scheme(self) -> Scheme | None:
        """Return the formats of a model, or None for plain numbers."""

    def scheme_of(self, formats: Mapping[str, WeightFormat]) -> Scheme | None:
        """Return the model's formats, given the formats of its files, by name."""
        return self.scheme()

    def ours(self) -> "QuantizationConfig":
        """Return the config of a model loaded from such files."""
        return self

    def divided(self, source: "QuantizationConfig | None") -> "QuantizationConfig":
        """Return the config of the same model sharded over processes.

        Args:
            source: that of its files.

        Raises:
            InputError: it cannot be held so.
        """
        return self

    @abstractmethod
    def stored(self, weight: str, shape: Shape, tensors: Tensors) -> WeightFormat | None:
        """Return the file format of a matrix; None for plain numbers."""

    def idle(self, name: str) -> bool:
        """Return whether a tensor of the files is unused."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the content for `config.json`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"quant_method": self.quant_method, **{k: _plain(v) for k, v in values.items()}}

    def described(
        self, quantised: Mapping[str, tuple[WeightFormat, Shape]], plain: Iterable[str]
    ) -> dict[str, Any]:
        """Return the content for the `config.json` of a written checkpoint.

        Args:
            quantised: format and shape of each matrix there, by its name.
            plain: names of matrices that stay numbers.
        """
        return self.to_dict()

    def keeping(self, modules: Iterable[str]) -> dict[str, Any]:
        """Return the config of a model whose linear maps `modules` stay unquantised."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a mapping; keys it does not know are an error.

        Raises:
            ConfigError: a key or a value is not usable.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are {sorted(known)}"
                raise ConfigError(f"quantization_config: {cls.__name__} has no {shown(key)}{hint}")
        return cls(**values)

    def _require(self, holds: bool, key: str, rule: str) -> None:
        if not holds:
            value = getattr(self, key)
            raise ConfigError(f"{type(self).__name__}: {key}={shown(value)} has to be {rule}")

    def _require_names(self, key: str) -> None:
        names = getattr(self, key)
        valid = isinstance(names, list | tuple) and all(isinstance(n, str) and n for n in names)
        self._require(names is None or valid, key, "a list of names of modules")


@dataclass(kw_only=True)
class _OwnConfig(QuantizationConfig):
    quant_method: ClassVar[str] = "quintet"
    bits: ClassVar[int]

    modules_to_not_convert: list[str] | None = None

    def __post_init__(self) -> None:
        self._require_names("modules_to_not_convert")

    def stored(self, weight: str, shape: Shape, tensors: Tensors) -> WeightFormat | None:
        """Return the file format of a matrix, which may differ from others'."""
        return integers_of(weight, shape, tensors)


@dataclass(kw_only=True)
class Int8Config(_OwnConfig):
    """8-bit weights with a scale per row, heads and tied embeddings included."""

    bits = 8

    def scheme(self) -> Scheme:
        return Scheme(Int8Format(), Int8Format(), tuple(self.modules_to_not_convert or ()))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "bits": self.bits, "group_size": None}


@dataclass(kw_only=True)
class Int4Config(_OwnConfig):
    """4-bit weights with a scale and offset per group of 32; heads by a table.

    Attributes:
        group_size: 32; or 64 for scales without offsets, fewer bytes and a larger loss, and heads
            in 8 bits.
    """

    bits = 4

    group_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.group_size in (32, 64), "group_size", "32 or 64")

    def scheme(self) -> Scheme:
        skip = tuple(self.modules_to_not_convert or ())
        if self.group_size == 64:
            return Scheme(Int4Format(), Int8Format(), skip)
        return Scheme(GroupFormat(4, 32, offset=True), GroupFormat(4, 32, iq4=True), skip)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "bits": self.bits}


@dataclass(kw_only=True)
class BitsAndBytesConfig(QuantizationConfig):
    """The formats of bitsandbytes; arguments and defaults are those of Transformers.

    The package is not needed. Experts are quantised like the other maps.

    Attributes:
        load_in_8bit: LLM.int8 (arXiv:2208.07339).
        load_in_4bit: NF4 or FP4 (arXiv:2305.14314).
        llm_int8_threshold: accepted: here no activation is quantised, so none is too large.
        llm_int8_skip_modules: modules that keep their numbers; None for the output head.
        llm_int8_enable_fp32_cpu_offload: accepted: the CPU computes in 8 bits too.
        llm_int8_has_fp16_weight: has to be false: there would be nothing quantised.
        bnb_4bit_compute_dtype: what inputs are converted to; None for no change.
        bnb_4bit_quant_type: "nf4" or "fp4".
        bnb_4bit_use_double_quant: whether the scales are quantised too.
        bnb_4bit_quant_storage: how bytes are declared on disk; uint8.
    """

    quant_method: ClassVar[str] = "bitsandbytes"

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        eight, four = self.load_in_8bit, self.load_in_4bit
        if not (isinstance(eight, bool) and isinstance(four, bool) and eight != four):
            raise ConfigError(
                f"BitsAndBytesConfig: exactly one of load_in_8bit={shown(eight)} and "
                f"load_in_4bit={shown(four)} has to be true"
            )
        self._require_names("llm_int8_skip_modules")
        threshold = self.llm_int8_threshold
        self._require(
            isinstance(threshold, float | int) and threshold >= 0,
            "llm_int8_threshold",
            "a number of at least 0",
        )
        self._require(
            self.llm_int8_has_fp16_weight is False,
            "llm_int8_has_fp16_weight",
            "false: weights in 16 bits are what a model without quantization_config has",
        )
        self._require(
            self.bnb_4bit_quant_type in ("nf4", "fp4"), "bnb_4bit_quant_type", "'nf4' or 'fp4'"
        )
        name = _dtype_name(self.bnb_4bit_compute_dtype)
        self._require(
            name is None or name in FLOAT_DTYPES,
            "bnb_4bit_compute_dtype",
            f"one of {FLOAT_DTYPES}",
        )
        self.bnb_4bit_compute_dtype = None if name is None else getattr(torch, name)
        self._require(
            _dtype_name(self.bnb_4bit_quant_storage) in (None, "uint8"),
            "bnb_4bit_quant_storage",
            "uint8",
        )
        self.bnb_4bit_quant_storage = torch.uint8

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping in any version of Transformers' names.

        Raises:
            ConfigError: a key or a value is not usable.
        """
        spoken = ("_load_in_8bit", "_load_in_4bit")
        return super().from_dict({k: v for k, v in values.items() if k not in spoken})

    def divided(self, source: QuantizationConfig | None) -> QuantizationConfig:
        """Return the config of the same model sharded over processes.

        Raises:
            InputError: scales were to be quantised, whose blocks are across processes.
        """
        if self.bnb_4bit_use_double_quant and source != self:
            raise InputError(
                "bnb_4bit_use_double_quant=True quantises the scales of 256 blocks at a time, of "
                "which several processes have parts; set it to False, or load a checkpoint that "
                "was saved so"
            )
        return dataclasses.replace(self, bnb_4bit_use_double_quant=False)

    def scheme(self) -> Scheme:
        weights: WeightFormat = RowwiseFormat()
        if self.load_in_4bit:
            weights = CodesFormat(self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant)
        skip = self.llm_int8_skip_modules
        compute = self.bnb_4bit_compute_dtype if self.load_in_4bit else None
        assert not isinstance(compute, str)
        return Scheme(weights, None if skip is None else weights, tuple(skip or ()), compute)

    def stored(self, weight: str, shape: Shape, tensors: Tensors) -> WeightFormat | None:
        """Return the file format of a matrix, recognised by its tensors' names."""
        if weight not in tensors or tensors[weight].dtype.is_floating_point:
            return None
        if tensors[weight].dtype == torch.int8:
            return RowwiseFormat()
        kind = self.bnb_4bit_quant_type
        for other in ("nf4", "fp4"):
            if f"{weight}.quant_state.bitsandbytes__{other}" in tensors:
                kind = other
        absmax = tensors.get(f"{weight}.absmax")
        numbers = torch.Size(shape).numel()
        block = None if absmax is None else block_size(numbers, torch.Size(absmax.shape).numel())
        return CodesFormat(kind, f"{weight}.nested_absmax" in tensors, block or 64)


@dataclass(kw_only=True)
class FineGrainedFP8Config(QuantizationConfig):
    """FP8 with a scale per block, as released by DeepSeek.

    Attributes:
        activation_scheme: "dynamic" or "static", which changes nothing: no activation is rounded.
        weight_block_size: rows and columns of a block.
        dequantize: hold the model in 16 bits.
        scale_fmt: "ue8m0" where scales are powers of two, as from DeepSeek-V3.1 on.
        modules_to_not_convert: modules that keep their numbers; None for the output head.
    """

    quant_method: ClassVar[str] = "fp8"

    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | list[int] = FP8_BLOCK
    dequantize: bool = False
    modules_to_not_convert: list[str] | None = None
    scale_fmt: str = "float"
    fmt: str = "e4m3"

    def __post_init__(self) -> None:
        self._require_names("modules_to_not_convert")
        self._require(
            self.activation_scheme in ("dynamic", "static"),
            "activation_scheme",
            "'dynamic' or 'static'",
        )
        self._require(self.scale_fmt in ("float", "ue8m0"), "scale_fmt", "'float' or 'ue8m0'")
        self._require(self.fmt == "e4m3", "fmt", "'e4m3'")
        self._require(isinstance(self.dequantize, bool), "dequantize", "true or false")
        sizes = self.weight_block_size
        self._require(
            isinstance(sizes, list | tuple)
            and len(sizes) == 2
            and all(type(size) is int and 0 < size <= MOST_OF_A_BLOCK for size in sizes),
            "weight_block_size",
            f"two positive integers up to {MOST_OF_A_BLOCK}",
        )

    def described(
        self, quantised: Mapping[str, tuple[WeightFormat, Shape]], plain: Iterable[str]
    ) -> dict[str, Any]:
        return self.keeping(name.removesuffix(".weight") for name in plain)

    def keeping(self, modules: Iterable[str]) -> dict[str, Any]:
        """List the unquantised modules; readers assume FP8 for all others."""
        names = {*(self.modules_to_not_convert or ()), *modules}
        return {**self.to_dict(), "modules_to_not_convert": sorted(names)}

    def scheme(self) -> Scheme | None:
        if self.dequantize:
            return None
        return Scheme(self._format(), skip=tuple(self.modules_to_not_convert or ()))

    def stored(self, weight: str, shape: Shape, tensors: Tensors) -> WeightFormat | None:
        """Return the file format of a matrix."""
        found = tensors.get(weight)
        return self._format() if found and found.dtype == torch.float8_e4m3fn else None

    def idle(self, name: str) -> bool:
        return name.endswith((".input_scale", ".activation_scale"))

    def _format(self) -> FP8Format:
        rows, columns = self.weight_block_size
        return FP8Format((rows, columns), self.scale_fmt == "ue8m0")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value


def _dtype_name(value: Any) -> Any:
    return None if value is None else str(value).removeprefix("torch.")
