"""Sequences in a pool get what they get alone, whoever joins and leaves beside them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import WIDE, Family, each
from quintet.cache import DynamicCache, PooledCache
from quintet.errors import ContextLengthError, InputError
from support import relative_error

TOLERANCE = 1e-5
V = 90
each_kind = pytest.mark.parametrize("nbits", [None, 8], ids=["dense", "int8"])


def small(family: Family) -> Any:
    return family.model_of(**WIDE[family.name])


def ids_of(*shape: int) -> Tensor:
    return torch.randint(2, V, shape)


def pool_of(model: Any, nbits: int | None = None, rows: int = 4) -> PooledCache:
    return PooledCache(model.config, rows=rows, capacity=48, nbits=nbits)


def spoil(pool: PooledCache) -> None:
    """Fill all memory that no row in use holds anything in with NaN, or with odd codes."""
    for slot in (*pool._memory, *pool._recurrent):
        for buffer in slot._buffers.whole:
            junk = float("nan") if buffer.is_floating_point() else 255
            buffer[len(pool.rows) :] = junk


@each
@each_kind
@torch.no_grad()
def test_it_serves_a_batch_as_a_growing_cache_does(family: Family, nbits: int | None) -> None:
    from quintet.cache import QuantizedCache

    model = small(family)
    pool = pool_of(model, nbits)
    plain = DynamicCache(model.config) if nbits is None else QuantizedCache(model.config, nbits)
    for T in (9, 1, 1, 3, 1):
        ids = ids_of(3, T)
        told = model(ids, past_key_values=plain).logits
        assert relative_error(model(ids, past_key_values=pool).logits, told) < TOLERANCE
    assert pool.lengths(3).tolist() == [15] * 3
