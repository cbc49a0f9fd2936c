"""Latent attention says to a kernel what it holds, where that is all there is to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

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


class Halved(Tensor):
    """What stands for a weight in a format of somebody else's: it knows products alone."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> "Halved":
        made: Halved = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        return made

    def __init__(self, weight: Tensor) -> None:
        self.half = weight.detach() / 2

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["half"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> "Halved":
        return Halved(2 * inner["half"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], 2 * args[1].half, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(2 * args[0].half)
        raise NotImplementedError(func)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["DeepseekV2", "DeepseekV3"])
def test_a_weight_in_a_format_of_somebody_else_is_multiplied_with(prefix: str) -> None:
    model = deepseek.model_of(prefix)
    ids = torch.arange(9)[None]
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    maps = [layer.self_attn.kv_b_proj for layer in model.model.layers]
    for module in (*maps, model.lm_head):
        module.weight = nn.Parameter(Halved(module.weight), requires_grad=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), plain)


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
