"""Chooses the cache for the options."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from quintet.errors import InputError, shown

# The names of `cache_implementation`; `generation/caches.py` makes them.
CACHES = ("dynamic", "static", "quantized", "offloaded")
# The names of `cache_dtype` and the bits of a number.
CACHE_BITS = {"int8": 8, "int6": 6, "int4": 4}


class CacheChoice(NamedTuple):
    """The name of a cache, and the bits of a quantised one."""

    kind: str
    bits: int


def choose_cache(
    kind: str | None, dtype: str | None, config: Mapping[str, Any] | None, *, compiles: bool
) -> CacheChoice:
    """Choose the kind of cache that the options name or imply.

    Raises:
        InputError: there is no such option, or two contradict each other.
    """
    bits = {CACHE_BITS[dtype]} if dtype else set()
    bits |= _configured_bits(config)
    if len(bits) > 1:
        raise InputError(
            f"GenerationConfig: cache_dtype={shown(dtype)} and cache_config={shown(config)} are of "
            "different bits; give one of the two"
        )
    if bits and kind not in (None, "quantized"):
        raise InputError(
            f"GenerationConfig: cache_implementation={shown(kind)} is not in few bits; leave "
            "cache_dtype and cache_config out, or use 'quantized'"
        )
    kind = kind or ("quantized" if bits else "static" if compiles else "dynamic")
    if compiles and kind != "static":
        raise InputError(
            "GenerationConfig: a compiled step needs cache_implementation='static', not "
            f"{shown(kind)}, which changes its shape"
        )
    return CacheChoice(kind, next(iter(bits), 8))


def _configured_bits(config: Mapping[str, Any] | None) -> set[int]:
    """Return the bits of Transformers' `cache_config`."""
    config = config or {}
    unknown = sorted(set(config) - {"nbits", "backend"})
    if unknown:
        raise InputError(
            f"GenerationConfig: cache_config has {', '.join(unknown)}; a quantized cache here has "
            "one scale a vector, and only nbits to choose"
        )
    if "backend" in config:
        warnings.warn(
            f"cache_config backend={shown(config['backend'])} is without effect: the cache is "
            "coded by quintet itself",
            stacklevel=6,
        )
    if "nbits" not in config:
        return set()
    if config["nbits"] not in CACHE_BITS.values():
        raise InputError(
            f"GenerationConfig: cache_config nbits={shown(config['nbits'])} has to be 8, 6 or 4"
        )
    return {config["nbits"]}
