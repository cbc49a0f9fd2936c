"""Packed forwards go on from one cache with and without gradients, in any order of modes."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from conformance.families import Family, each
from quintet.cache import Cache, DynamicCache, OffloadedCache, QuantizedCache, StaticCache
from quintet.errors import InputError
from support import relative_error

MODES: dict[str, Any] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
CACHES: dict[str, Callable[[Any], Cache]] = {
    "dynamic": DynamicCache,
    "static": lambda config: StaticCache(config, 40),
    "offloaded": OffloadedCache,
    "int8": QuantizedCache,
}


@each
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("seed", range(2))
def test_rows_of_any_lengths_go_on_in_any_mode(family: Family, kind: str, seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    model = family.model_of()
    cache = CACHES[kind](model.config)
    texts: list[list[int]] = [[], [], []]
    losses = []
    for _ in range(6):
        name = chance.choice(list(MODES))
        counts = [chance.randint(1, 4) for _ in texts]
        if chance.random() < 0.3:
            counts = [counts[0]] * 3
        ids = torch.randint(2, 90, (sum(counts),))
        ends = torch.tensor([0, *counts]).cumsum(0)
        before = cache.lengths(3).tolist()
        with MODES[name]():
            try:
                logits = model(ids[None], cu_seq_lens_q=ends, past_key_values=cache).logits[0]
            except InputError:
                # Codes have no gradient: refused, and nothing has changed.
                assert (kind, name) == ("int8", "grad")
                assert cache.lengths(3).tolist() == before
                continue
        if name == "grad":
            losses.append(logits.square().mean())
        for row, (own, new) in enumerate(zip(logits.split(counts), ids.split(counts), strict=True)):
            texts[row] += new.tolist()
            if kind == "int8":
                assert own.isfinite().all()
                continue
            with torch.no_grad():
                told = model(torch.tensor([texts[row]]), use_cache=False).logits[0, -len(new) :]
            assert relative_error(own, told) < 1e-5
    for loss in losses:
        loss.backward(retain_graph=True)
    if losses:
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
