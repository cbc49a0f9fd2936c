"""What the layers keep between steps."""

from quintet.cache.base import AttentionSlot, Cache, CacheSlot, Span
from quintet.cache.dense import DynamicCache, StaticCache
from quintet.cache.legacy import LegacyCache, from_legacy, to_legacy
from quintet.cache.offloaded import OffloadedCache
from quintet.cache.quantized import QuantizedCache
from quintet.cache.recurrent import RecurrentSlot

__all__ = [
    "AttentionSlot",
    "Cache",
    "CacheSlot",
    "DynamicCache",
    "LegacyCache",
    "OffloadedCache",
    "QuantizedCache",
    "RecurrentSlot",
    "Span",
    "StaticCache",
    "from_legacy",
    "to_legacy",
]
