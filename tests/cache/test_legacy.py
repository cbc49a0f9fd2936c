"""The tuple format of older code: padding stays in its columns, and a round trip loses nothing."""

import pytest
import torch
from torch import Tensor

from quintet.cache import LegacyCache, from_legacy, to_legacy
from quintet.errors import InputError
from support import small_config

LAYERS, B, K, D = 3, 2, 2, 4
MASKS = {
    "none": None,
    "full": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "right": [[1, 1, 1, 0], [1, 0, 0, 0]],
    "holes": [[1, 0, 0, 1], [0, 1, 0, 1]],
    "one-row-empty": [[0, 0, 0, 0], [1, 1, 0, 1]],
}
masks = pytest.mark.parametrize(
    "mask", [m if m is None else torch.tensor(m) for m in MASKS.values()], ids=MASKS
)


def some_tuples(P: int = 4) -> LegacyCache:
    return tuple((torch.randn(B, K, P, D), torch.randn(B, K, P, D)) for _ in range(LAYERS))


def assert_same_tokens(ours: LegacyCache, theirs: LegacyCache, mask: Tensor | None) -> None:
    kept = slice(None) if mask is None else mask.to(torch.bool)
    for mine, other in zip(ours, theirs, strict=True):
        for x, y in zip(mine, other, strict=True):
            assert x.shape == y.shape
            assert torch.equal(x.transpose(1, 2)[kept], y.transpose(1, 2)[kept])


@masks
def test_round_trip(mask: Tensor | None) -> None:
    past = some_tuples()
    cache = from_legacy(past, mask, LAYERS)
    counts = [4, 4] if mask is None else mask.sum(dim=1).tolist()
    assert cache.lengths(B).tolist() == counts
    assert cache.get_seq_length() == max(counts)  # packed: no slot is spent on padding
    assert_same_tokens(to_legacy(cache, mask), past, mask)


@masks
def test_a_row_is_packed_in_order(mask: Tensor | None) -> None:
    past = some_tuples()
    cache = from_legacy(past, mask, LAYERS)
    for row in range(B):
        kept = torch.ones(4, dtype=torch.bool) if mask is None else mask[row].to(torch.bool)
        for (keys, values), (k, v) in zip(cache, past, strict=True):
            count = int(kept.sum())
            assert torch.equal(keys[row, :, :count], k[row][:, kept])
            assert torch.equal(values[row, :, :count], v[row][:, kept])


@masks
def test_continuing_leaves_the_tuples_as_they_were(mask: Tensor | None) -> None:
    past = some_tuples()
    before = [x.clone() for pair in past for x in pair]
    cache = from_legacy(past, mask, LAYERS)
    cache.crop(-1)
    span = cache.segment(B, 1, torch.device("cpu"), None)
    for layer in range(LAYERS):
        cache.update(torch.ones(B, K, 1, D), torch.ones(B, K, 1, D), layer, span)
    cache.advance(span)
    assert all(torch.equal(x, y) for x, y in zip(before, (x for p in past for x in p), strict=True))


def test_new_tokens_land_behind_in_wider_columns() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    past = some_tuples()
    cache = from_legacy(past, mask, LAYERS)
    span = cache.segment(B, 1, torch.device("cpu"), None)
    new = torch.full((B, K, 1, D), 5.0)
    for layer in range(LAYERS):
        cache.update(new, 2 * new, layer, span)
    cache.advance(span)
    wider = to_legacy(cache, torch.cat((mask, torch.ones(B, 1, dtype=torch.long)), dim=1))
    assert_same_tokens(tuple((k[:, :, :4], v[:, :, :4]) for k, v in wider), past, mask)
    assert all(
        torch.equal(k[:, :, 4:], new) and torch.equal(v[:, :, 4:], 2 * new) for k, v in wider
    )


def test_gradients_flow_through() -> None:
    mask = torch.tensor([[0, 1], [1, 1]])
    past = tuple(
        (torch.randn(B, K, 2, D, requires_grad=True), torch.randn(B, K, 2, D))
        for _ in range(LAYERS)
    )
    keys = to_legacy(from_legacy(past, mask, LAYERS), mask)[1][0]
    (gradient,) = torch.autograd.grad(keys[:, :, 1].sum(), past[1][0])
    assert torch.equal(gradient[:, :, 1], torch.ones(B, K, D))
    assert not gradient[:, :, 0].any()


@pytest.mark.parametrize(
    ("past", "named"),
    [
        pytest.param(some_tuples()[:2], "has 2 layers and the model 3", id="layers"),
        pytest.param(((), (), ()), r"past_key_values\[0\] holds \[\]", id="empty-pairs"),
        pytest.param(
            (*some_tuples()[:2], (torch.zeros(B, K, 4, D),)), r"past_key_values\[2\]", id="one-only"
        ),
        pytest.param(
            (*some_tuples()[:2], some_tuples(5)[0]),
            r"past_key_values\[2\] holds \[\(2, 2, 5, 4\)",
            id="another-length",
        ),
        pytest.param(
            ((torch.zeros(3, 4), torch.zeros(3, 4)),) * 3, r"past_key_values\[0\]", id="axes"
        ),
    ],
)
def test_tuples_of_another_shape_are_named(past: LegacyCache, named: str) -> None:
    with pytest.raises(InputError, match=named):
        from_legacy(past, None, LAYERS)


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (1, 4)], ids=str)
def test_a_mask_of_other_columns_is_named(shape: tuple[int, int]) -> None:
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(InputError, match=r"attention_mask has shape .* 2 rows of 4 columns"):
        from_legacy(some_tuples(), mask, LAYERS)


def test_a_model_continues_from_tuples_as_from_a_cache() -> None:
    from quintet import Qwen2ForCausalLM

    model = Qwen2ForCausalLM(small_config()).eval()
    ids = torch.randint(0, 101, (2, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        first = model(ids[:, :5], attention_mask=mask[:, :5])
        rest = model(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
        first = model(ids[:, :5], attention_mask=mask[:, :5])
        legacy = to_legacy(first.past_key_values, mask[:, :5])
        again = model(ids[:, 5:], attention_mask=mask, past_key_values=legacy)
    torch.testing.assert_close(again.logits, rest.logits)
    assert isinstance(again.past_key_values, tuple)
    assert again.past_key_values[0][0].shape[2] == 7
