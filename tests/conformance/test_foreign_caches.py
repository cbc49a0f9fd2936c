"""A cache that is not the model's is named, and so is what has no numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import quintet
from comparisons import TOLERANCE
from conformance.families import FAMILIES, Family, each
from quintet import Cache, DynamicCache, OffloadedCache, QuantizedCache, StaticCache
from quintet.errors import InputError
from support import relative_error

IDS = torch.randint(1, 101, (2, 9), generator=torch.Generator().manual_seed(5))
KINDS: dict[str, Callable[[Any], Cache]] = {
    "dynamic": DynamicCache,
    "static": lambda config: StaticCache(config, 32),
    "offloaded": OffloadedCache,
    "quantised": QuantizedCache,
}


def filled(model: Any, kind: str = "dynamic", ids: torch.Tensor = IDS) -> Cache:
    cache = KINDS[kind](model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def other_sizes(family: Family) -> dict[str, Any]:
    """The same layers with other heads."""
    if family.prefix.startswith("Deepseek"):
        return {"kv_lora_rank": 20}
    return {"num_key_value_heads": 1}


@pytest.mark.parametrize("kind", KINDS)
@each
def test_a_cache_of_another_family_is_named(family: Family, kind: str) -> None:
    model = family.model_of()
    for other in FAMILIES:
        if other is family or {family.prefix, other.prefix} in (
            {"Qwen2", "Qwen2Moe"},
            {"DeepseekV2", "DeepseekV3"},
        ):
            # What these keep is alike.
            continue
        cache = filled(other.model_of(), kind)
        entries: tuple[Callable[[], Any], ...] = (
            lambda cache=cache: model(IDS[:, :2], past_key_values=cache),
            lambda cache=cache: model.generate(
                torch.cat((IDS, IDS[:, :2]), dim=1), past_key_values=cache, max_new_tokens=2
            ),
        )
        for call in entries:
            with torch.no_grad(), pytest.raises(InputError, match=r"cache|keeps"):
                call()


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
@each
def test_a_cache_of_other_sizes_is_named(family: Family, kind: str) -> None:
    model = family.model_of()
    cache = filled(family.model_of(**other_sizes(family)), kind)
    step = IDS[:, :1]
    for ids in (IDS, step):
        with torch.no_grad(), pytest.raises(InputError, match=r"holds .* and the model makes"):
            model(ids, past_key_values=cache)
        if model.config.recurrent_layers():
            break
    deeper = family.model_of(
        num_hidden_layers=model.config.num_hidden_layers + 1,
        **({"layers_block_type": None} if family.prefix == "Zamba2" else {}),
    )
    with torch.no_grad(), pytest.raises(InputError, match=r"layers and the model"):
        deeper(IDS, past_key_values=filled(model, kind))


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
@each
def test_a_cache_in_another_dtype_is_named(family: Family, kind: str) -> None:
    model = family.model_of()
    cache = filled(model, kind)
    model.to(torch.bfloat16)
    for ids in (IDS, IDS[:, :1]):
        with (
            torch.no_grad(),
            pytest.raises(InputError, match=r"torch\.float32 .*torch\.bfloat16"),
        ):
            model(ids, past_key_values=cache)
    model.to(torch.float32)
    cache.reset()
    with torch.no_grad():
        again = model(IDS, past_key_values=cache).logits
        fresh = model(IDS, past_key_values=KINDS[kind](model.config)).logits
        # What has its memory already may take few tokens another way.
        assert relative_error(again, fresh) <= TOLERANCE


@each
def test_what_fails_at_once_leaves_a_cache_as_it_was(family: Family) -> None:
    model = family.model_of()
    cache = filled(model)
    with torch.no_grad():
        expected = model(IDS[:, :1], past_key_values=filled(model)).logits
        for bad in (
            {"input_ids": IDS[:1]},
            {"input_ids": IDS.to("meta")},
            {"input_ids": IDS, "attention_mask": torch.ones(2, 9, device="meta")},
        ):
            with pytest.raises(InputError):
                model(**bad, past_key_values=cache)
        assert torch.equal(model(IDS[:, :1], past_key_values=cache).logits, expected)


@each
def test_what_has_no_numbers_is_named(family: Family) -> None:
    model = family.model_of()
    for call in (model, model.generate):
        with pytest.raises(InputError, match="is on the meta device"):
            call(IDS.to("meta"))
    # A model there has none either, and tells what shapes it makes.
    assert model.to("meta")(IDS.to("meta"), use_cache=False).logits.shape == (2, 9, 101)


@each
def test_a_cache_of_another_library_is_named_with_its_module(family: Family) -> None:
    model = family.model_of()
    theirs = transformers.DynamicCache()
    with pytest.raises(
        InputError, match=r"transformers\.cache_utils\.DynamicCache; it has to be a Cache"
    ):
        model(IDS, past_key_values=theirs)
    with pytest.raises(
        InputError, match=r"transformers\.cache_utils\.DynamicCache; it has to be a Cache"
    ):
        model.generate(IDS, past_key_values=theirs, max_new_tokens=2)


@each
def test_a_cache_without_a_config_gets_the_models_layers(family: Family) -> None:
    model = family.model_of()
    with torch.no_grad():
        for cut in (1, 4, 8):
            cache, known = DynamicCache(), DynamicCache(model.config)
            assert (len(cache), cache.get_seq_length(), cache.batch_size) == (0, 0, None)
            for ids in IDS.split([cut, 9 - cut], dim=1):
                made = model(ids, past_key_values=cache).logits
                right = model(ids, past_key_values=known).logits
                assert torch.equal(made, right)
            assert len(cache) == len(known)
        text = model.generate(IDS, past_key_values=DynamicCache(), max_new_tokens=4)
        assert torch.equal(text, model.generate(IDS, max_new_tokens=4))


def test_a_cache_without_a_config_grows_by_what_it_is_given() -> None:
    cache = DynamicCache()
    keys, values = torch.randn(2, 1, 2, 3, 4).unbind()
    span = cache.segment(1, 3, keys.device, None)
    for layer in range(3):
        made = cache.update(keys + layer, values, layer, span)
        assert relative_error(made[0], keys + layer) < TOLERANCE
    cache.advance(span)
    assert (len(cache), cache.get_seq_length()) == (3, 3)
    assert torch.equal(cache[2][0], keys + 2)
    assert isinstance(quintet.DynamicCache(), Cache)
