"""compressed-tensors, the format family of llm-compressor and vLLM."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch

from quintet.checkpoint import TensorInfo
from quintet.configuration.patterns import PLAIN, is_plain
from quintet.errors import ConfigError, UnsupportedModelError, shown
from quintet.quantization.compressed_formats import (
    FP4Format,
    FP8File,
    IntegersFormat,
    PackedFormat,
    RowsFormat,
)
from quintet.quantization.foreign import ELSEWHERE, FileConfig, dtype_of
from quintet.quantization.formats import Shape, WeightFormat
from quintet.quantization.mixed import FP8_ROWS

FORMATS = (
    *("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision"),
)
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
# Of activations and caches, which are not quantised here.
IDLE = tuple(
    f".{name}"
    for name in (
        *("input_scale", "output_scale", "input_zero_point", "output_zero_point"),
        *("input_global_scale", "q_scale", "k_scale", "v_scale", "weight_shape"),
        *("weight_zero_point", "weight_g_idx"),
    )
)
# As many as there are groups of modules in files, and more.
MOST_GROUPS, MOST_TARGETS = 1000, 100_000


@dataclass(frozen=True, slots=True)
class WeightSettings:
    """The quantisation of a group of modules, from `config_groups`.

    Attributes:
        group: columns of a group; None for all.
        block: rows and columns of a block of FP8; None if there are none.
    """

    bits: int
    integers: bool
    symmetric: bool
    group: int | None
    whole: bool
    block: tuple[int, int] | None
    ordered: bool


@dataclass(kw_only=True)
class CompressedTensorsConfig(FileConfig):
    """compressed-tensors files; settings of activations and caches are ignored.

    Attributes:
        format: how files are packed, unless a group says it.
        config_groups: what modules have: `targets` and `weights`.
        sparsity_config: has to be empty: nothing sparse is read.
        transform_config: has to be empty: weights that are rotated are not read.
    """

    quant_method: ClassVar[str] = "compressed-tensors"

    format: str = "dense"
    config_groups: Mapping[str, Any] = field(default_factory=dict)
    sparsity_config: Any = None
    transform_config: Any = None

    def __post_init__(self) -> None:
        self._check_format(self.format)
        for key in ("sparsity_config", "transform_config"):
            value = getattr(self, key)
            empty = not value or (isinstance(value, Mapping) and value.get("format") == "dense")
            empty = empty or value == {"config_groups": {}}
            if not empty:
                raise UnsupportedModelError(
                    f"quantization_config: {key}={shown(value)} is not supported; {ELSEWHERE}"
                )
        groups = self.config_groups
        self._require(
            isinstance(groups, Mapping) and len(groups) <= MOST_GROUPS,
            "config_groups",
            f"a mapping of at most {MOST_GROUPS} groups",
        )
        self._groups = [self._read(name, group) for name, group in groups.items()]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a configuration from a mapping.

        Raises:
            ConfigError: a value is not usable.
            UnsupportedModelError: a format that is not read.
        """
        known = ("format", "config_groups", "sparsity_config", "transform_config")
        return cls(**{key: values[key] for key in known if values.get(key) is not None})

    def usual(self) -> WeightFormat | None:
        weights = [weights for _, weights in self._groups if weights is not None]
        if not weights:
            return None
        one = weights[0]
        if one.integers and one.whole and one.symmetric and one.bits == 8:
            return RowsFormat().model_format
        if one.integers:
            return PackedFormat(one.bits, one.group, one.symmetric, one.ordered).model_format
        return None if one.bits == 4 else FP8File(_block(one)).model_format

    def stored(
        self, weight: str, shape: Shape, tensors: Mapping[str, TensorInfo]
    ) -> WeightFormat | None:
        """Return the file format of a matrix; None for plain numbers.

        Raises:
            ConfigError: it is quantised, and no group says how.
        """
        packed, plain = tensors.get(f"{weight}_packed"), tensors.get(weight)
        if packed is None and f"{weight}_scale" not in tensors:
            return None
        one = self._weights(weight.removesuffix(".weight"))
        dtype = dtype_of(tensors, f"{weight}_scale")
        scales = {
            ending: tensors[f"{weight}_{ending}"].shape
            for ending in ("shape", "g_idx", "zero_point", "global_scale")
            if f"{weight}_{ending}" in tensors
        }
        if packed is not None and packed.dtype == torch.uint8:
            return FP4Format(16 if "global_scale" in scales else 32, "global_scale" in scales)
        if packed is not None or plain is None:
            return PackedFormat(
                one.bits,
                one.group,
                one.symmetric,
                one.ordered and "g_idx" in scales,
                dtype,
                whole=one.whole,
                present=tuple(name for name in ("shape", "g_idx") if name in scales),
            )
        if plain.dtype == torch.float8_e4m3fn:
            return FP8File(_block(one), whole=one.whole)
        if one.symmetric and one.group is None:
            return RowsFormat(one.whole)
        return IntegersFormat(8, one.group, one.symmetric, False, dtype, whole=one.whole)

    def idle(self, name: str) -> bool:
        return name.endswith(IDLE)

    def _weights(self, path: str) -> WeightSettings:
        """Return a module's group: by its name, else by its class."""
        by_class = None
        other = "Linear" if path.endswith("embed_tokens") else "Embedding"
        for targets, weights in self._groups:
            for target in targets:
                if target == path or (isinstance(target, re.Pattern) and target.match(path)):
                    if weights is not None:
                        return weights
                elif isinstance(target, str) and target[:1].isupper() and target != other:
                    by_class = by_class or weights
        given = [weights for _, weights in self._groups if weights is not None]
        if by_class is None and len(given) != 1:
            raise ConfigError(
                f"quantization_config: {path} is quantised in the files, and none of "
                f"{len(given)} config_groups names it or its class; config.json is another model's"
            )
        return by_class or given[0]

    def _read(
        self, name: Any, group: Any
    ) -> tuple[tuple[str | re.Pattern[str], ...], WeightSettings | None]:
        if not isinstance(group, Mapping):
            raise ConfigError(
                f"quantization_config: config_groups[{shown(name)}] has to be a mapping"
            )
        if group.get("format") is not None:
            self._check_format(group["format"])
        targets = group.get("targets") or []
        usable = isinstance(targets, list | tuple) and len(targets) <= MOST_TARGETS
        if not usable or not all(isinstance(t, str) for t in targets):
            raise ConfigError(
                f"quantization_config: targets={shown(targets)} has to be a list of names"
            )
        weights = group.get("weights")
        return tuple(_target(t) for t in targets), None if weights is None else _read(weights)

    def _check_format(self, name: Any) -> None:
        if not isinstance(name, str) or name not in FORMATS:
            raise UnsupportedModelError(
                f"quantization_config: format={shown(name)} of compressed-tensors is not read; "
                f"there are {', '.join(FORMATS)}; {ELSEWHERE}"
            )


def _target(text: str) -> str | re.Pattern[str]:
    if not text.startswith("re:"):
        return text
    if not is_plain(text[3:]):
        raise ConfigError(f"quantization_config: targets has {shown(text)}, which is no {PLAIN}")
    return re.compile(text[3:])


def _read(given: Any) -> WeightSettings:
    if not isinstance(given, Mapping):
        raise ConfigError(f"quantization_config: weights={shown(given)} has to be a mapping")
    bits, kind, size = given.get("num_bits", 8), given.get("type", "int"), given.get("group_size")
    strategy = given.get("strategy") or ("group" if size not in (None, -1) else "tensor")
    symmetric, structure = given.get("symmetric", True), given.get("block_structure")
    rules = (
        ("num_bits", bits, type(bits) is int and bits in (4, 8), f"4 or 8; {ELSEWHERE}"),
        ("type", kind, kind in ("int", "float"), "'int' or 'float'"),
        ("symmetric", symmetric, isinstance(symmetric, bool), "true or false"),
        ("strategy", strategy, strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
        ("group_size", size, size in (None, -1) or (type(size) is int and size > 0), "positive"),
        ("block_structure", structure, structure is None or _is_block(structure), "two sizes"),
    )
    for key, value, holds, rule in rules:
        if not holds:
            raise ConfigError(f"quantization_config: {key}={shown(value)} has to be {rule}")
    grouped = strategy in ("group", "tensor_group")
    for wrong, missing in ((grouped, "group_size"), (strategy == "block", "block_structure")):
        if wrong and given.get(missing) in (None, -1):
            raise ConfigError(f"quantization_config: strategy={strategy!r} needs a {missing}")
    return WeightSettings(
        bits=bits,
        integers=kind == "int",
        symmetric=symmetric,
        group=size if grouped else None,
        whole=strategy == "tensor",
        block=(structure[0], structure[1]) if strategy == "block" and structure else None,
        ordered=given.get("actorder") in (True, "group", "dynamic"),
    )


def _is_block(structure: Any) -> bool:
    sizes = isinstance(structure, list | tuple) and len(structure) == 2
    return sizes and all(type(n) is int and 0 < n <= FP8_ROWS[1] for n in structure)


def _block(one: WeightSettings) -> tuple[int, int]:
    if one.block is not None:
        return one.block
    return FP8_ROWS if one.group is None else (1, min(one.group, FP8_ROWS[1]))
