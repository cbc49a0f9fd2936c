"""Opens the caches named by `cache_implementation`."""

from collections.abc import Callable
from dataclasses import dataclass

from quintet.cache import Cache, OffloadedCache, QuantizedCache, StaticCache
from quintet.configuration.base import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """The arguments to make a cache.

    Attributes:
        config: the model's.
        grown: makes an empty cache of the kind the model grows.
        length: how many tokens a row will hold at the most.
        nbits: of a number, where a cache of few bits is asked for.
    """

    config: PreTrainedConfig
    grown: Callable[[], Cache]
    length: int
    nbits: int


# One for each name in `cache_choice.CACHES`.
MAKERS: dict[str, Callable[[CacheRequest], Cache]] = {
    "dynamic": lambda request: request.grown(),
    "static": lambda request: StaticCache(request.config, max_cache_len=request.length),
    "quantized": lambda request: QuantizedCache(request.config, request.nbits),
    "offloaded": lambda request: OffloadedCache(request.config),
}


def open_cache(name: str, request: CacheRequest) -> Cache:
    """Return an empty cache of a kind."""
    return MAKERS[name](request)
