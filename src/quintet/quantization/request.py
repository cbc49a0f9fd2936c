"""Resolves the quantisation of a model from the request and its files."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from quintet.configuration.foreign import described
from quintet.errors import ConfigError, InputError, UnsupportedModelError, shown
from quintet.quantization.awq import AWQConfig
from quintet.quantization.compressed import CompressedTensorsConfig
from quintet.quantization.config import (
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Int4Config,
    Int8Config,
    QuantizationConfig,
)
from quintet.quantization.foreign import FileConfig
from quintet.quantization.formats import FP8Format, WeightFormat
from quintet.quantization.gguf import GGUFConfig
from quintet.quantization.gptq import AutoRoundConfig, GPTQConfig
from quintet.quantization.mixed import MixedConfig
from quintet.quantization.mlx import MLXConfig
from quintet.quantization.scheme import Scheme
from quintet.quantization.torchao import TorchAoConfig
from quintet.quantization.whole_fp8 import WholeFP8Config, is_whole

# The least CUDA capability with a product of FP8 matrices.
FP8_CAPABILITY = (8, 9)

SHORT: Mapping[str, QuantizationConfig | None] = MappingProxyType(
    {
        "int8": Int8Config(),
        "int4": Int4Config(),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "fp8": FineGrainedFP8Config(),
        "none": None,
    }
)


@dataclass(frozen=True, slots=True)
class QuantizationRequest:
    """The quantisation of the files, and of the model.

    Attributes:
        source: the configuration of the files; None for plain numbers.
        target: that of the model; None for plain numbers.
        keeps_fp8: whether what files have in FP8 may stay so.
    """

    source: QuantizationConfig | None
    target: QuantizationConfig | None
    keeps_fp8: bool = True

    def scheme(self, formats: Mapping[str, WeightFormat]) -> Scheme | None:
        """Return the formats of the model; None for plain numbers.

        Args:
            formats: those that its files would be held in, by the model's names.
        """
        if self.target is None:
            return None
        allowed = {
            name: one
            for name, one in formats.items()
            if self.keeps_fp8 or not isinstance(one, FP8Format)
        }
        return self.target.scheme_of(allowed)


def resolve_quantization(
    stored: Any, quantize: str | None, config: Any, device: torch.device
) -> QuantizationRequest:
    """Choose the quantisation by `quantize`, `quantization_config` and the files.

    Without a wish, a model stays what its files are; FP8 only where the device multiplies it, and
    elsewhere it becomes plain numbers.

    Raises:
        InputError: both wishes at once, or a `quantize` that does not exist.
        ConfigError: a configuration has a value that breaks a rule.
        UnsupportedModelError: a method that is not here.
    """
    source = read(stored) if stored else None
    if quantize is not None and config is not None:
        raise InputError(
            f"quantize={quantize!r} and quantization_config are one option; give one of them"
        )
    if quantize is not None:
        if not isinstance(quantize, str) or quantize not in SHORT:
            raise InputError(
                f"quantize={shown(quantize)} has to be one of {', '.join(SHORT)}, or None"
            )
        return QuantizationRequest(source, SHORT[quantize])
    keeps_fp8 = config is not None or multiplies_fp8(device)
    target = source if config is None else read(config)
    of_files = isinstance(target, FileConfig) or type(target) is MixedConfig
    if target is not None and of_files and target != source:
        raise InputError(
            f"quantization_config={shown(target.to_dict())} says how files are, and these are "
            f"{shown(None if source is None else source.to_dict())}; leave it out to load them as "
            "they are, or use quantize='int4' or 'int8'"
        )
    if isinstance(source, FineGrainedFP8Config) and not keeps_fp8:
        target = None
    if target is not None:
        target = target.ours()
    if isinstance(target, FineGrainedFP8Config) and target.dequantize:
        target = None
    return QuantizationRequest(source, target, keeps_fp8)


def multiplies_fp8(device: torch.device) -> bool:
    """Return whether a device multiplies FP8 matrices."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


METHODS: Mapping[str, type[QuantizationConfig]] = {
    "bitsandbytes": BitsAndBytesConfig,
    "fp8": FineGrainedFP8Config,
    "gguf": GGUFConfig,
    "torchao": TorchAoConfig,
    "gptq": GPTQConfig,
    "auto-round": AutoRoundConfig,
    "awq": AWQConfig,
    "compressed-tensors": CompressedTensorsConfig,
    "mlx": MLXConfig,
}


def read(values: Any) -> QuantizationConfig:
    """Return the config for a `quantization_config` object or mapping.

    Raises:
        UnsupportedModelError: the method is none of those here.
        ConfigError: a key or a value is not usable.
    """
    if isinstance(values, QuantizationConfig):
        return values
    description = described(values)
    if description is None:
        raise ConfigError(
            f"quantization_config is a {type(values).__module__}.{type(values).__qualname__}: "
            f"{shown(values)}; it has to be a configuration of quintet or of "
            "Transformers, or a mapping"
        )
    given = dict(description)
    if description is not values:
        # An object has a value for every key, a mapping those that somebody gave.
        given = {name: value for name, value in given.items() if value is not None}
    method = given.pop("quant_method", None)
    if method is None and (given.get("load_in_8bit") or given.get("load_in_4bit")):
        method = "bitsandbytes"
    if method == "quintet":
        return _own(given)
    if method == "fp8" and is_whole(given):
        return WholeFP8Config.from_dict(given)
    if not isinstance(method, str) or method not in METHODS:
        raise UnsupportedModelError(
            f"quant_method={shown(method)} is not supported; there are quintet, "
            f"{', '.join(METHODS)}. Use a copy of the model in bfloat16"
        )
    return METHODS[method].from_dict(given)


def _own(given: dict[str, Any]) -> QuantizationConfig:
    bits, group = given.pop("bits", None), given.pop("group_size", None)
    if bits is None and group is None:
        return MixedConfig.from_dict(given)
    if (bits, group) == (8, None):
        return Int8Config.from_dict(given)
    if bits == 4 and group is not None:
        return Int4Config.from_dict({**given, "group_size": group})
    raise ConfigError(
        f"quantization_config: bits={shown(bits)} with group_size={shown(group)} has to be 8 with "
        "null, 4 with 32 or 64, or null with null"
    )
