"""Caches: the memory of layers between forwards."""

from quintet.cache.base import Cache
from quintet.cache.content import RowContent
from quintet.cache.dense import DynamicCache, StaticCache
from quintet.cache.kept import Kept
from quintet.cache.legacy import LegacyCache, from_legacy, to_legacy
from quintet.cache.offloaded import OffloadedCache
from quintet.cache.pool import PooledCache
from quintet.cache.quantized import QuantizedCache
from quintet.cache.recurrent import RecurrentSlot
from quintet.cache.segment import Segment, segments_of
from quintet.cache.slots import AttentionSlot, CacheSlot

__all__ = [
    "AttentionSlot",
    "Cache",
    "CacheSlot",
    "DynamicCache",
    "Kept",
    "LegacyCache",
    "OffloadedCache",
    "PooledCache",
    "QuantizedCache",
    "RecurrentSlot",
    "RowContent",
    "Segment",
    "StaticCache",
    "from_legacy",
    "segments_of",
    "to_legacy",
]
