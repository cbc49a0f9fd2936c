"""Caches that keep less, or keep it elsewhere, in every family."""

from typing import Any

import pytest
import torch
from torch import Tensor

from comparisons import TOLERANCE
from conformance.families import FAMILIES, Family, each
from quintet import Cache, DynamicCache, OffloadedCache, QuantizedCache
from quintet.errors import InputError
from quintet.ops.vector_codes import BITS
from support import relative_error

TEXT = torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def run(model: Any, cache: Cache, cuts: tuple[int, ...]) -> Tensor:
    """Logits (B, T, V) of the text, given piece by piece."""
    pieces = TEXT.split(cuts, dim=1)
    return torch.cat([model(ids, past_key_values=cache).logits for ids in pieces], dim=1)


def attention_bytes(cache: Cache) -> int:
    return sum(slot.nbytes for slot in cache.layers if slot is not None)


@each()
def test_offloaded_keys_are_the_same_keys(family: Family) -> None:
    model = family.model_of()
    dynamic, offloaded = DynamicCache(model.config), OffloadedCache(model.config)
    cuts = (9, 1, 1, 13)
    assert torch.equal(run(model, dynamic, cuts), run(model, offloaded, cuts))
    assert offloaded.nbytes == dynamic.nbytes


@pytest.mark.parametrize("bits", BITS)
@each()
def test_a_text_in_few_bits_is_the_same_however_it_is_cut(family: Family, bits: int) -> None:
    model = family.model_of()
    whole = run(model, QuantizedCache(model.config, bits), (24,))
    for cuts in ((9, 15), (1,) * 24):
        again = run(model, QuantizedCache(model.config, bits), cuts)
        # A number between two steps may be rounded to the other one, so only most are the same.
        off = (again - whole).abs().amax(dim=-1) / whole.abs().max()
        assert float(off.median()) < 10 * TOLERANCE


@each()
def test_fewer_bits_take_fewer_bytes_and_cost_accuracy(family: Family) -> None:
    # All experts active: which ones a token takes is no error of the cache.
    model = family.model_of(**family.rounded).to(torch.bfloat16)
    exact = DynamicCache(model.config)
    logits = run(model, exact, (24,)).float()
    errors, sizes = [], []
    for bits in BITS:
        cache = QuantizedCache(model.config, bits)
        errors.append(relative_error(run(model, cache, (24,)).float(), logits))
        sizes.append(attention_bytes(cache))
        vectors = sum(
            2 * keys.shape[0] * keys.shape[1] * keys.shape[2]
            for slot in cache.layers
            if slot is not None
            for keys, _ in (slot.content(24),)
        )
        assert sizes[-1] == attention_bytes(exact) * bits // 16 + 2 * vectors
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.1


def test_no_gradient_is_lost_unseen() -> None:
    model = FAMILIES[0].model_of()
    with pytest.raises(InputError, match=r"no gradient.*torch\.no_grad"):
        model(TEXT, past_key_values=QuantizedCache(model.config))


@each()
def test_generate_takes_every_kind_by_its_name(family: Family) -> None:
    model = family.model_of()
    mask = torch.ones_like(TEXT)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": -1 % 101}
    plain = model.generate(TEXT, **options)
    assert torch.equal(plain, model.generate(TEXT, cache_implementation="offloaded", **options))
    for asked in (
        {"cache_implementation": "quantized", "cache_dtype": "int6"},
        {"cache_dtype": "int6"},
        {"cache_implementation": "quantized", "cache_config": {"nbits": 6}},
    ):
        out = model.generate(TEXT, return_dict_in_generate=True, **asked, **options)
        assert isinstance(out.past_key_values, QuantizedCache)
        assert out.past_key_values.nbits == 6
        given = QuantizedCache(model.config, 6)
        assert torch.equal(out.sequences, model.generate(TEXT, past_key_values=given, **options))
