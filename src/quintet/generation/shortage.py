"""The error for a generation that runs out of memory."""

from contextlib import suppress

import torch

from quintet.cache import Cache
from quintet.errors import DoesNotFitError
from quintet.generation.config import GenerationConfig
from quintet.generation.rows import Cached, Rows
from quintet.ops.device_memory import empty_caches, free_memory

# Of the memory there is, what caches may take: a step needs some, too.
SHARE = 0.8


def does_not_fit(
    model: Cached, rows: int, tokens: int, config: GenerationConfig, cache: Cache | None
) -> DoesNotFitError:
    """Return the error, with the number of rows that fit.

    Args:
        model: what was run.
        rows: how many there were.
        tokens: how many each would have had in the end.
        config: the options.
        cache: what was kept for them and nobody needs any more; None for nothing.
    """
    if cache is not None:
        cache.reset()
    empty_caches()
    nbits = config.cache.bits if config.cache.kind == "quantized" else None
    free, nbytes = free_memory(model.device), _bytes_of(model, tokens, nbits)
    fits = "" if nbytes is None else _fitting(rows, tokens, nbytes, int(SHARE * free))
    return DoesNotFitError(
        f"there was not enough memory for {rows} rows of {tokens:,} tokens{fits}; give fewer rows "
        "at once or fewer max_new_tokens, read prompts in pieces (prefill_chunk_size), or keep "
        "less of them (cache_implementation='quantized' or 'offloaded')"
    )


def _fitting(rows: int, tokens: int, nbytes: int, free: int) -> str:
    most, may = free // nbytes, f"{free / 1e9:.3g} GB that caches may take beside the model"
    if most < rows:
        own = f"the cache of each takes {nbytes / 1e9:.3g} GB in the end"
        return f": {own}, and of {may}, about {most:,} such rows fit"
    taken = f"their caches take {rows * nbytes / 1e9:.3g} of {may}"
    return f": {taken}, so that it was the prompt that took the rest"


@torch.no_grad()
def _bytes_of(model: Cached, tokens: int, nbits: int | None) -> int | None:
    """Return the bytes of a row of this many tokens, or None if unknown."""
    if model.world is not None:
        # All would have to try it together.
        return None
    with suppress(Exception):
        row, token = Rows(model, 1, 1, nbits).cache.bytes_of_rows()
        return row + token * tokens
    return None
