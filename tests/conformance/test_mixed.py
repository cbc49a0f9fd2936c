"""Tokens of several sequences in one forward, unequally many of each: each is what it is alone."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from comparisons import TOLERANCE
from conformance.families import Family, each
from quintet import DynamicCache, OffloadedCache, QuantizedCache, StaticCache
from quintet.cache import Cache
from quintet.errors import InputError
from support import relative_error

IDS = torch.randint(101, (3, 24), generator=torch.Generator().manual_seed(5))
KINDS: dict[str, Callable[[Any], Cache]] = {
    "dynamic": DynamicCache,
    "static": lambda config: StaticCache(config, 24),
    "offloaded": OffloadedCache,
}


def forward(model: Any, cache: Cache, pieces: Sequence[Tensor], **options: Any) -> Any:
    """Continue the rows of a cache by as many tokens as each piece has."""
    ends = torch.tensor([0, *accumulate(map(len, pieces))])
    options = {"use_cache": True, **options}
    return model(
        torch.cat(list(pieces))[None], past_key_values=cache, cu_seq_lens_q=ends, **options
    )


def run(model: Any, cache: Cache, schedule: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits of each row's tokens, given as many at a time as the schedule says."""
    at, made = [0] * len(IDS), [[] for _ in IDS]  # type: ignore[var-annotated]
    for counts in schedule:
        pieces = [ids[a : a + n] for ids, a, n in zip(IDS, at, counts, strict=True)]
        logits = forward(model, cache, pieces).logits[0].split(list(counts))
        at = [a + n for a, n in zip(at, counts, strict=True)]
        for row, own in zip(made, logits, strict=True):
            row.append(own)
    assert cache.lengths(len(IDS)).tolist() == at
    return [torch.cat(row) for row in made]


SCHEDULE = ((5, 0, 7), (1, 3, 1), (1, 1, 1), (0, 9, 2), (4, 1, 0))


@pytest.mark.parametrize("kind", KINDS)
@each
@torch.no_grad()
def test_pieces_and_steps_in_one_forward(family: Family, kind: str) -> None:
    model = family.model_of()
    for ids, made in zip(IDS, run(model, KINDS[kind](model.config), SCHEDULE), strict=True):
        assert relative_error(made, model(ids[None, : len(made)]).logits[0]) <= TOLERANCE


@each
@torch.no_grad()
def test_codes_of_fewer_bits_do_not_depend_on_the_mix(family: Family) -> None:
    model = family.model_of()
    made = run(model, QuantizedCache(model.config), SCHEDULE)
    for row, own in enumerate(made):
        alone = QuantizedCache(model.config)
        expected = forward(model, alone, [IDS[row, : len(own)]]).logits[0]
        # A number at the edge between two codes takes either, by the last bit.
        assert relative_error(own, expected) <= 1e-3


COUNTS = st.tuples(*[st.integers(0, 6)] * 3).filter(any)


@each
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    schedule=st.lists(COUNTS, min_size=1, max_size=4), attention=st.sampled_from(["sdpa", "eager"])
)
@torch.no_grad()
def test_any_schedule(family: Family, schedule: list[tuple[int, int, int]], attention: str) -> None:
    model = family.model_of()
    model.set_attn_implementation(attention)
    made = run(model, DynamicCache(model.config), schedule)
    for ids, own in zip(IDS, made, strict=True):
        if len(own):
            assert relative_error(own, model(ids[None, : len(own)]).logits[0]) <= TOLERANCE


@each
def test_gradients_pass_a_cache_of_unequal_rows(family: Family) -> None:
    model = family.model_of().train()
    cache = DynamicCache(model.config)
    loss = torch.zeros(())
    for counts, start in (((5, 2, 4), (0, 0, 0)), ((1, 3, 2), (5, 2, 4))):
        pieces = [ids[a : a + n] for ids, a, n in zip(IDS, start, counts, strict=True)]
        loss = loss + forward(model, cache, pieces).logits.square().mean(dim=-1).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for ids, n in zip(IDS, (6, 5, 6), strict=True):
        model(ids[None, :n]).logits.square().mean(dim=-1).sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert relative_error(mixed[name], p.grad) <= 10 * TOLERANCE, name


@each
@torch.no_grad()
def test_padding_passes_no_layer(family: Family) -> None:
    model = family.model_of()
    seen = []
    for layer in model.base_model.layers:
        layer.register_forward_hook(lambda module, given, made: seen.append(made.shape[:2].numel()))
    mask = torch.ones(3, 24)
    mask[1, 5:] = mask[2, :20] = 0
    for cache in (None, DynamicCache(model.config), StaticCache(model.config, 30)):
        seen.clear()
        made = model(IDS, attention_mask=mask, past_key_values=cache).logits
        assert set(seen) == {24 + 5 + 4}
        for ids, own, kept in zip(IDS, made, mask.bool(), strict=True):
            assert relative_error(own[kept], model(ids[kept][None]).logits[0]) <= TOLERANCE


@each
@torch.no_grad()
def test_rows_that_do_not_fit_are_named(family: Family) -> None:
    model = family.model_of()
    cache = DynamicCache(model.config)
    forward(model, cache, IDS[:2, :4])
    with pytest.raises(InputError, match="holds 2 rows and the input has 3"):
        forward(model, cache, IDS[:, :4])
    assert cache.lengths(2).tolist() == [4, 4]
