"""Gradients through forwards that continue from a cache, in every family."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from families import deepseek, qwen2_moe, zamba2
from quintet import DynamicCache, Qwen2ForCausalLM, StaticCache
from support import relative_error, small_config

MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(small_config()),
    "qwen2_moe": lambda: qwen2_moe.model_of(),
    "deepseek_v2": lambda: deepseek.model_of("DeepseekV2"),
    "deepseek_v3": lambda: deepseek.model_of("DeepseekV3"),
    "zamba2": lambda: zamba2.model_of(),
}
IDS = torch.arange(1, 25).view(2, 12)


def gradient(model: Any, cache: Any, tracked: bool) -> Tensor:
    """The embedding's gradient of a text in two forwards, the first with or without a graph."""
    model.zero_grad()
    with torch.set_grad_enabled(tracked):
        model(IDS[:, :5], past_key_values=cache)
    model(IDS[:, 5:], past_key_values=cache, labels=IDS[:, 5:]).loss.backward()
    grad = model.get_input_embeddings().weight.grad
    assert grad is not None
    return grad.clone()


@pytest.mark.parametrize("tracked", [False, True], ids=["constant-past", "tracked-past"])
@pytest.mark.parametrize("family", MODELS)
def test_preallocated_and_recomputing_give_the_gradients_of_the_growing_cache(
    family: str, tracked: bool
) -> None:
    torch.manual_seed(1)
    model = MODELS[family]().train()
    frugal = copy.deepcopy(model)
    frugal.gradient_checkpointing_enable()
    expected = gradient(model, DynamicCache(model.config), tracked)
    for other in (model, frugal):
        for cache in (DynamicCache(model.config), StaticCache(model.config, 16)):
            assert relative_error(gradient(other, cache, tracked), expected) < 1e-5
