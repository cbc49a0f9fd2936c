"""Texts that are read in pieces, carried on from a cache, or given as embeddings."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import FAMILIES, Family
from quintet import DynamicCache, StaticCache
from quintet.cache import to_legacy
from quintet.errors import InputError

# Rows of 11, 4 and 7 tokens.
MASK = torch.tensor([[1] * 11, [0] * 7 + [1] * 4, [0] * 4 + [1] * 7])


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    family: Family = request.param
    return family.model_of(initializer_range=0.2, eos_token_id=None, pad_token_id=0)


def ids() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(1, 101, (3, 11)) * MASK


def plain(model: Any, prompt: Tensor, mask: Tensor | None = None, new: int = 8) -> list[Any]:
    options = {} if mask is None else {"attention_mask": mask}
    out: Tensor = model.generate(prompt, max_new_tokens=new, **options)
    return out[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 50])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_read_in_pieces(model: Any, chunk: int, kind: str) -> None:
    options = {"max_new_tokens": 8, "prefill_chunk_size": chunk, "cache_implementation": kind}
    out = model.generate(ids(), attention_mask=MASK, **options)
    assert out[:, 11:].tolist() == plain(model, ids(), MASK)


def test_pieces_need_a_cache(model: Any) -> None:
    with pytest.raises(InputError, match="prefill_chunk_size=3 needs a cache"):
        model.generate(ids(), prefill_chunk_size=3, use_cache=False)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_carried_across_calls(model: Any, kind: str) -> None:
    """A chat of three turns, whose rows have different lengths and end at different times."""
    cache: Any = StaticCache(model.config, 64) if kind == "static" else model.new_cache()
    rows = [row[row != 0] for row in ids()]
    # Padding is 0 here, and a text has none.
    options = {"max_new_tokens": 6, "suppress_tokens": [0], "pad_token_id": 0}
    free = [model.generate(row[None], **options)[0, len(row) :].tolist() for row in rows]
    options["eos_token_id"] = [free[0][2], free[2][4]]
    for turn in range(3):
        width = max(len(row) for row in rows)
        batch = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0)) for r in rows])
        out = model.generate(batch, attention_mask=batch != 0, past_key_values=cache, **options)
        for place, row in enumerate(rows):
            alone = model.generate(row[None], **options)[0]
            made = out[place, width:]
            assert made[made != 0].tolist() == alone[len(row) :].tolist(), (turn, place)
            turned = torch.tensor([turn + 3, 40 + place][: 1 + place % 2])
            rows[place] = torch.cat((alone, turned))
        assert all(cache.lengths(3) < torch.tensor([len(row) for row in rows]))


def test_a_returned_cache_goes_on(model: Any) -> None:
    first = model.generate(
        ids(), attention_mask=MASK, max_new_tokens=4, return_dict_in_generate=True
    )
    longer = torch.cat((first.sequences, torch.tensor([[7, 8]] * 3)), dim=1)
    mask = torch.cat((MASK, torch.ones(3, 6, dtype=torch.long)), dim=1)
    out = model.generate(
        longer, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=5
    )
    assert out[:, longer.shape[1] :].tolist() == plain(model, longer, mask, new=5)


def test_new_tokens_alone_with_the_mask_of_all(model: Any) -> None:
    cache = model(ids(), attention_mask=MASK, use_cache=True).past_key_values
    new = torch.tensor([[5, 6], [7, 8], [9, 10]])
    mask = torch.cat((MASK, torch.ones_like(new)), dim=1)
    out = model.generate(new, attention_mask=mask, past_key_values=cache, max_new_tokens=5)
    assert out[:, :2].tolist() == new.tolist()
    assert out[:, 2:].tolist() == plain(model, torch.cat((ids(), new), dim=1), mask, new=5)


def test_a_cache_in_pieces_and_in_copies(model: Any) -> None:
    cache = model(ids()[:1, :5], use_cache=True).past_key_values
    out = model.generate(
        ids()[:1],
        past_key_values=cache,
        prefill_chunk_size=2,
        do_sample=True,
        top_k=1,
        num_return_sequences=3,
        max_new_tokens=5,
    )
    assert out[:, 11:].tolist() == plain(model, ids()[:1], new=5) * 3


def test_a_cache_that_holds_too_much_is_refused(model: Any) -> None:
    cache = model(ids()[:1], use_cache=True).past_key_values
    with pytest.raises(InputError, match=r"holds \[11\] tokens of rows that have \[11\]"):
        model.generate(ids()[:1], past_key_values=cache)
    mask = torch.ones(1, 11, dtype=torch.long)
    with pytest.raises(InputError, match=r"counts \[9\] tokens before the new 2.* holds \[11\]"):
        model.generate(ids()[:1, :2], attention_mask=mask, past_key_values=cache)


# -- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 4])
def test_embeddings_in_place_of_ids(model: Any, chunk: int | None) -> None:
    embeds = model.get_input_embeddings()(ids())
    options = {"attention_mask": MASK, "max_new_tokens": 8, "prefill_chunk_size": chunk}
    alone = model.generate(inputs_embeds=embeds, **options)
    assert alone.tolist() == plain(model, ids(), MASK)
    both = model.generate(ids(), inputs_embeds=embeds, **options)
    assert both.tolist() == torch.cat((ids(), alone), dim=1).tolist()
    # Padding may be on either side.
    right = model.get_input_embeddings()(ids().flip(1)).clone()
    for row, length in enumerate(MASK.sum(dim=1)):
        right[row, :length] = embeds[row, 11 - length :]
    moved = model.generate(inputs_embeds=right, **{**options, "attention_mask": MASK.flip(1)})
    assert moved.tolist() == alone.tolist()


def test_beams_from_embeddings(model: Any) -> None:
    embeds = model.get_input_embeddings()(ids())
    options = {"attention_mask": MASK, "max_new_tokens": 5, "num_beams": 3}
    made = model.generate(inputs_embeds=embeds, **options)
    assert made.tolist() == model.generate(ids(), **options)[:, 11:].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2)}, r"inputs_embeds has shape \(1, 2\)"),
        ({"input_ids": torch.ones(2, 3).long()}, "input_ids has 2 rows and inputs_embeds 1"),
        ({"use_cache": False}, "inputs_embeds needs a cache"),
        (
            {"token_healing": True, "tokenizer": SimpleNamespace(get_vocab=dict)},
            "token_healing=True needs ids",
        ),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask has shape"),
    ],
)
def test_bad_embeddings(model: Any, options: dict[str, Any], message: str) -> None:
    embeds = torch.zeros(1, 3, model.config.hidden_size)
    with pytest.raises(InputError, match=message):
        model.generate(**{"inputs_embeds": embeds, **options})


def test_tuples_of_older_code_are_taken() -> None:
    model = FAMILIES[0].model_of(initializer_range=0.2, eos_token_id=None, pad_token_id=0)
    cut = MASK.clone()
    # Every row has begun by the eighth column.
    cache = model(ids()[:, :8], attention_mask=cut[:, :8], use_cache=True).past_key_values
    past = to_legacy(cache, cut[:, :8])
    out = model.generate(ids(), attention_mask=cut, past_key_values=past, max_new_tokens=5)
    assert out[:, 11:].tolist() == plain(model, ids(), MASK, new=5)


def test_what_contradicts_a_cache() -> None:
    model = FAMILIES[0].model_of()
    for name, value in (("use_cache", False), ("cache_implementation", "static")):
        with pytest.raises(InputError, match=f"{name}={value!r} and past_key_values contradict"):
            model.generate(ids(), past_key_values=model.new_cache(), **{name: value})
    with pytest.raises(InputError, match="past_key_values is a dict; it has to be a Cache"):
        model.generate(ids(), past_key_values={})
    with pytest.warns(UserWarning, match="max_cache_len=99 has no effect without"):
        model.generate(ids(), max_cache_len=99, max_new_tokens=1)


def test_a_cache_of_another_kind_is_a_cache() -> None:
    family = FAMILIES[0]
    model = family.model_of(initializer_range=0.2, eos_token_id=None, pad_token_id=0)
    cache = DynamicCache(model.config)
    model.generate(ids()[:1], past_key_values=cache, max_new_tokens=3)
    assert cache.get_seq_length() == 13
