"""Quantised weights: which modules, which format, and their layout on disk."""

from quintet.quantization.apply import EncodedWeight, Slot, apply, cut, freeze, part_state, tie
from quintet.quantization.config import (
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    Int4Config,
    Int8Config,
    QuantizationConfig,
)
from quintet.quantization.dividing import check_divided
from quintet.quantization.formats import GroupFormat, Int4Format, Int8Format, WeightFormat
from quintet.quantization.mixed import MixedConfig
from quintet.quantization.modules import (
    Quantized,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    refuse_idle_training,
)
from quintet.quantization.request import QuantizationRequest, resolve_quantization
from quintet.quantization.scheme import Scheme
from quintet.quantization.stored import Stored, packed, read, stored
from quintet.quantization.torchao import TorchAoConfig
from quintet.quantization.words import PackedConfig

__all__ = [
    "BitsAndBytesConfig",
    "EncodedWeight",
    "FineGrainedFP8Config",
    "GroupFormat",
    "Int4Config",
    "Int4Format",
    "Int8Config",
    "Int8Format",
    "MixedConfig",
    "PackedConfig",
    "QuantizationConfig",
    "QuantizationRequest",
    "Quantized",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "Scheme",
    "Slot",
    "Stored",
    "TorchAoConfig",
    "WeightFormat",
    "apply",
    "check_divided",
    "cut",
    "freeze",
    "packed",
    "part_state",
    "read",
    "refuse_idle_training",
    "resolve_quantization",
    "stored",
    "tie",
]
