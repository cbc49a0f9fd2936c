"""Recurrent slots and the caches that hold them: going back, selecting, forgetting."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.families import WIDE
from families.zamba2 import SHAPES, model_of
from quintet.cache import Cache, DynamicCache, StaticCache
from quintet.errors import ContextLengthError, InputError
from quintet.models.zamba2 import Zamba2ForCausalLM, Zamba2HybridDynamicCache
from support import relative_error

TOLERANCE = 1e-5
KINDS = ["growing", "preallocated"]


def cache_of(model: Zamba2ForCausalLM, kind: str) -> Cache:
    if kind == "growing":
        return DynamicCache(model.config)
    return StaticCache(model.config, max_cache_len=40)


def ids_of(B: int, T: int) -> Tensor:
    return torch.randint(1, 101, (B, T))


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), wide=st.booleans())
def test_rows_go_back_to_lengths_of_their_own_since_the_snapshot(
    data: st.DataObject, kind: str, wide: bool
) -> None:
    """As speculation does: take a snapshot, run ragged drafts, keep part of each, go on."""
    # Wide enough for the kernel of all layers, or not.
    model = model_of(**SHAPES["7b"], **(WIDE["zamba2"] if wide else {}))
    cache = cache_of(model, kind)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    texts: list[list[int]] = [[], []]

    def run(T: int) -> Tensor:
        ids = torch.randint(1, 101, (2, T), generator=generator)
        mask = torch.rand(2, T, generator=generator) < 0.8
        mask[:, -1] = True
        logits: Tensor = model(ids, attention_mask=mask.long(), past_key_values=cache).logits
        for row in range(2):
            texts[row] += ids[row, mask[row]].tolist()
        return logits[:, -1]

    run(data.draw(st.integers(1, 5)))
    for _ in range(2):
        cache.snapshot()
        before = [len(text) for text in texts]
        for _ in range(data.draw(st.integers(1, 3))):
            run(data.draw(st.integers(1, 4)))
        for _ in range(data.draw(st.integers(1, 2))):
            kept = [data.draw(st.integers(before[i], len(texts[i]))) for i in range(2)]
            texts = [text[:n] for text, n in zip(texts, kept, strict=True)]
            cache.crop(torch.tensor(kept))
            assert cache.lengths(2).tolist() == kept
        logits = run(2)
        for row in range(2):
            alone = model(torch.tensor([texts[row]]), use_cache=False).logits[0, -1]
            assert relative_error(logits[row], alone) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("snapshots", [False, True])
def test_rows_come_back_to_what_was_kept_as_often_as_wanted(kind: str, snapshots: bool) -> None:
    model = model_of()
    cache = cache_of(model, kind)
    empty = cache.keep()
    assert empty.nbytes == 0
    ids, mask = ids_of(2, 9), torch.tensor([[1] * 9, [0] * 2 + [1] * 7])
    model(ids, attention_mask=mask, past_key_values=cache)
    kept = cache.keep()
    assert kept.nbytes > 0
    further = ids_of(2, 5)
    expected = model(further, past_key_values=cache).logits
    for _ in range(2):
        if snapshots:
            cache.snapshot()
            model(ids_of(2, 2), past_key_values=cache)
        cache.restore(kept)
        assert cache.lengths(2).tolist() == [9, 7]
        assert not any(slot.remembers for slot in cache.states if slot is not None)
        assert relative_error(model(further, past_key_values=cache).logits, expected) < TOLERANCE
    cache.restore(cache.keep())
    cache.restore(kept)
    cache.reset()
    with pytest.raises(InputError, match=r"\[9, 7\] tokens and the cache holds \[0"):
        cache.restore(kept)
    cache.restore(empty)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_going_back_without_a_snapshot_is_refused_and_changes_nothing(kind: str) -> None:
    model = model_of()
    cache = cache_of(model, kind)
    ids = ids_of(2, 12)
    model(ids[:, :6], past_key_values=cache)
    for back in (4, -1, torch.tensor([6, 5])):
        with pytest.raises(InputError, match=r"there is none.*snapshot\(\)"):
            cache.crop(back)
    with pytest.raises(InputError, match=r"cannot go back to .*3.* tokens"):
        model(ids[:, 3:4], past_key_values=cache, cache_position=torch.tensor([3]))
    cache.snapshot()
    model(ids[:, 6:9], past_key_values=cache)
    with pytest.raises(InputError, match=r"cannot go back to .*5.* tokens.* was at .*6.* tokens"):
        cache.crop(5)
    assert cache.get_seq_length() == 9
    # As long as it is: nothing to go back from.
    cache.crop(9)
    cache.crop(100)
    whole = model(ids, use_cache=False).logits
    rest = model(ids[:, 9:], past_key_values=cache, cache_position=torch.arange(9, 12)).logits
    assert relative_error(rest, whole[:, 9:]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_cache_can_be_gone_back_to(kind: str) -> None:
    model = model_of()
    cache = cache_of(model, kind)
    ids, other = ids_of(2, 9), ids_of(2, 7)
    cache.snapshot()
    model(other, past_key_values=cache)
    cache.crop(0)
    whole = model(ids, use_cache=False).logits
    assert relative_error(model(ids, past_key_values=cache).logits, whole) < TOLERANCE
    cache.crop(4)
    again = model(ids[:, 4:], past_key_values=cache).logits
    assert relative_error(again, whole[:, 4:]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marked", [False, True])
def test_rows_are_selected_with_all_they_keep(kind: str, marked: bool) -> None:
    model = model_of(**SHAPES["7b"])
    cache = cache_of(model, kind)
    ids, more = ids_of(3, 8), ids_of(4, 3)
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[1, :3] = 0
    model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    if marked:
        cache.snapshot()
    model(ids[:, 6:], attention_mask=mask, past_key_values=cache)
    rows = torch.tensor([1, 0, 1, 2])
    cache.reorder_cache(rows)
    assert cache.batch_size == 4
    texts = [ids[r, mask[r].bool()] for r in rows]
    if marked:
        cache.crop(cache.lengths(4) - torch.tensor([1, 2, 0, 1]))
        texts = [t[: len(t) - n] for t, n in zip(texts, (1, 2, 0, 1), strict=True)]
    logits = model(more, past_key_values=cache).logits
    for row, text in enumerate(texts):
        alone = model(torch.cat((text, more[row]))[None], use_cache=False).logits[0, -3:]
        assert relative_error(logits[row], alone) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_repeated_and_forgotten(kind: str) -> None:
    model = model_of()
    cache = cache_of(model, kind)
    ids = ids_of(2, 6)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    more = ids_of(4, 2)
    logits = model(more, past_key_values=cache).logits
    whole = model(torch.cat((ids.repeat_interleave(2, 0), more), 1), use_cache=False).logits
    assert relative_error(logits, whole[:, 6:]) < TOLERANCE

    pointers = [x.data_ptr() for slot in cache.states if slot for x in (slot.window, slot.state)]
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(torch.cat((ids.repeat_interleave(2, 0), more), 1), past_key_values=cache).logits
    assert relative_error(again, whole) < TOLERANCE
    kept = [x.data_ptr() for slot in cache.states if slot for x in (slot.window, slot.state)]
    assert kind == "growing" or kept == pointers


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_what_the_layers_keep(kind: str) -> None:
    model = model_of()
    cache = cache_of(model, kind)
    assert cache.nbytes == 0
    model(ids_of(2, 6), past_key_values=cache)
    held = cache.nbytes
    states = 4 * 2 * 4 * (64 * 8 + 3 * (64 + 16))  # layers, rows, bytes, state and window
    keys = 2 * 2 * 2 * 4 * 64 * (6 if kind == "growing" else 40)
    assert held == states + keys
    assert all(slot is not None and slot.state.dtype == torch.float32 for slot in cache.states)
    cache.snapshot()
    assert cache.nbytes == held + states


@torch.no_grad()
def test_states_stay_in_float32_in_a_bfloat16_model() -> None:
    model = model_of().bfloat16()
    cache = model(ids_of(1, 6)).past_key_values
    for step in (ids_of(1, 1), ids_of(1, 3)):
        model(step, past_key_values=cache)
    assert cache.recurrent(0).state.dtype == torch.float32
    assert cache.recurrent(0).window.dtype == torch.bfloat16


def test_a_forward_that_fails_halfway_is_noticed() -> None:
    model = model_of()
    cache = DynamicCache(model.config)
    ids = ids_of(1, 9)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
        cache.snapshot()
        broken = model.model.layers[2].register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="halfway"):
            model(ids[:, 4:6], past_key_values=cache)
        broken.remove()
        with pytest.raises(InputError, match="failed halfway"):
            model(ids[:, 4:6], past_key_values=cache)
        cache.crop(4)
        rest = model(ids[:, 4:], past_key_values=cache).logits
        assert relative_error(rest, model(ids, use_cache=False).logits[:, 4:]) < TOLERANCE


def _fail(*_: Any) -> None:
    raise RuntimeError("halfway")


@torch.no_grad()
def test_caches_that_do_not_fit_the_model_are_named() -> None:
    model = model_of()
    plain = DynamicCache(num_hidden_layers=4)
    with pytest.raises(InputError, match="no recurrent state for layer 0"):
        model(ids_of(1, 3), past_key_values=plain)
    tuples: Any = tuple((torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16)) for _ in range(4))
    with pytest.raises(InputError, match="no recurrent state"):
        model(ids_of(1, 3), past_key_values=tuples)
    cache = model(ids_of(1, 3)).past_key_values
    with pytest.raises(InputError, match="layer 0 keeps a recurrent state, not keys"):
        cache[0]
    assert cache[1][0].shape == (1, 4, 3, 16)
    full = StaticCache(model.config, max_cache_len=4)
    with pytest.raises(ContextLengthError):
        model(ids_of(1, 5), past_key_values=full)
    with pytest.raises(InputError, match="holds 1 rows and the input has 2"):
        model(ids_of(2, 1), past_key_values=cache)


@torch.no_grad()
def test_the_older_name_makes_the_same_cache() -> None:
    model = model_of()
    ids = ids_of(2, 9)
    cache = Zamba2HybridDynamicCache(model.config, 2, dtype=torch.float32, device="cpu")
    model(ids[:, :5], past_key_values=cache)
    rest = model(ids[:, 5:], past_key_values=cache).logits
    assert relative_error(rest, model(ids, use_cache=False).logits[:, 5:]) < TOLERANCE


@torch.no_grad()
def test_attention_caches_take_snapshots_without_asking() -> None:
    from quintet import Qwen2ForCausalLM
    from support import small_config

    model = Qwen2ForCausalLM(small_config()).eval()
    for cache in (DynamicCache(model.config), StaticCache(model.config, max_cache_len=16)):
        model(ids_of(1, 6), past_key_values=cache)
        cache.snapshot()
        cache.crop(2)
        assert cache.get_seq_length() == 2


def test_a_state_made_in_inference_mode_can_be_continued() -> None:
    from families.zamba2 import model_of

    model = model_of()
    ids = torch.arange(1, 13)[None]
    with torch.inference_mode():
        cache = model(ids[:, :8]).past_key_values
    with torch.no_grad():
        rest = model(ids[:, 8:], past_key_values=cache).logits
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(rest, whole[:, 8:], rtol=1e-4, atol=1e-5)
