"""Latent attention says to a kernel what it holds, where that is all there is to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from families import deepseek
from quintet.kernels import parts
from quintet.layers.linear import Linear
from quintet.layers.mla import LatentAttention

NORM = parts.Norm(torch.ones(48, dtype=torch.bfloat16), 1e-6)


def attention(**changes: Any) -> LatentAttention:
    model = deepseek.model_of("DeepseekV2", kv_lora_rank=32, **changes).to(torch.bfloat16)
    made = model.model.layers[0].self_attn
    assert isinstance(made, LatentAttention)
    return made


class Own(Linear):
    """A map of somebody else's."""


def replace_map(layer: LatentAttention) -> None:
    layer.kv_b_proj.__class__ = Own


def replace_first_map(layer: LatentAttention) -> None:
    layer.q_a_proj = nn.Linear(48, 20)


def replace_norm(layer: LatentAttention) -> None:
    layer.q_a_layernorm = nn.Identity()  # type: ignore[assignment]


def replace_latents_norm(layer: LatentAttention) -> None:
    layer.kv_a_layernorm = nn.Identity()  # type: ignore[assignment]


def hook_map(layer: LatentAttention) -> None:
    layer.kv_b_proj.register_forward_hook(lambda *_: None)


def drop_weights(layer: LatentAttention) -> None:
    layer.attention_dropout = 0.5
    layer.train()


def hold_integers(layer: LatentAttention) -> None:
    layer.kv_b_proj = nn.Identity()  # type: ignore[assignment]


@pytest.mark.parametrize(
    "change",
    [
        replace_map,
        replace_first_map,
        replace_norm,
        replace_latents_norm,
        hook_map,
        drop_weights,
        hold_integers,
    ],
    ids=lambda f: f.__name__,
)
def test_what_is_more_than_its_weights_has_to_be_called(
    change: Callable[[LatentAttention], None],
) -> None:
    layer = attention()
    assert layer.part(NORM) is not None
    change(layer)
    assert layer.part(NORM) is None


def test_training_without_dropout_is_no_reason() -> None:
    layer = attention(q_lora_rank=None)
    layer.train()
    assert layer.part(NORM) is not None
