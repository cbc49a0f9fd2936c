"""Opens the caches named by `cache_implementation`."""

from collections.abc import Callable

from quintet.cache import Cache, OffloadedCache, QuantizedCache, StaticCache
from quintet.configuration.base import PreTrainedConfig
from quintet.errors import InputError
from quintet.generation.compiling import ROOM_STEP
from quintet.generation.config import GenerationConfig


def open_cache(
    options: GenerationConfig, config: PreTrainedConfig, grown: Callable[[], Cache], length: int
) -> Cache:
    """Return an empty cache of the kind that the options name.

    Args:
        options: of the generation.
        config: the model's.
        grown: makes the cache that the model grows by default.
        length: the number of tokens that rows may reach.

    Raises:
        InputError: `max_cache_len` is beyond the model's context.
    """
    if options.compiles:
        length = -(-length // ROOM_STEP) * ROOM_STEP
    context = config.max_position_embeddings
    if (options.max_cache_len or 0) > max(context, length):
        raise InputError(
            f"max_cache_len={options.max_cache_len} is more than the model's context of "
            f"{context} (max_position_embeddings), so that it would never be filled"
        )
    kind, bits = options.cache
    match kind:
        case "static":
            return StaticCache(config, max_cache_len=options.max_cache_len or length)
        case "quantized":
            return QuantizedCache(config, bits)
        case "offloaded":
            return OffloadedCache(config)
        case _:
            return grown()
