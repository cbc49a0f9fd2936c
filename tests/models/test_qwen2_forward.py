"""Caches of older callers, and masks that contradict a cache."""

from typing import Any

import pytest
import torch

from families.qwen2 import randomise
from quintet import Qwen2ForCausalLM, StaticCache
from quintet.errors import ContextLengthError, InputError
from support import relative_error, small_config

TOLERANCE = 1e-5


def model_of(**changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(small_config(**changes)).eval()
    randomise(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_legacy_tuples_are_taken_and_given_back(padded: bool) -> None:
    model = model_of()
    ids = torch.randint(101, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
    past: Any = tuple((torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16)) for _ in range(3))
    steps = []
    for start, stop in ((0, 6), (6, 7), (7, 10)):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past)
        past = out.past_key_values
        assert isinstance(past, tuple)
        assert past[0][0].shape == (2, 2, stop, 16)
        steps.append(out.logits)
    whole = model(ids, attention_mask=mask).logits
    kept = mask.bool()
    assert relative_error(torch.cat(steps, dim=1)[kept], whole[kept]) < TOLERANCE


@torch.no_grad()
def test_contradictions_between_mask_and_cache_are_named() -> None:
    model = model_of()
    ids = torch.randint(101, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    with pytest.raises(InputError, match=r"\[6, 6\].*\[6, 4\]"):
        model(ids[:, :1], attention_mask=torch.ones(2, 7), past_key_values=cache)
    with pytest.raises(InputError, match="2 rows and the input has 3"):
        model(torch.randint(101, (3, 1)), past_key_values=cache)
    full = StaticCache(model.config, max_cache_len=6)
    model(ids, past_key_values=full)
    with pytest.raises(ContextLengthError, match="room for max_cache_len=6"):
        model(ids[:, :1], past_key_values=full)
