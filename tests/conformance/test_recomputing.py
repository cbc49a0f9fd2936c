"""Layers that are recomputed in training: in every way there is, with the gradients of none."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import Family, each
from conformance.heads import B, T, ids_of, made
from quintet.errors import ConfigError, InputError
from quintet.layers.recompute import Recompute

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "not-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "every-second": {"every_n_layers": 2},
    "every-ninth": {"every_n_layers": 9},
    "offloaded": {"offload": True},
    "all": {
        "gradient_checkpointing_kwargs": {"use_reentrant": True, "preserve_rng_state": True},
        "every_n_layers": 2,
        "offload": True,
    },
}


def learner(family: Family) -> tuple[Any, dict[str, Any]]:
    """A model in training, and all that its loss can have."""
    changes: dict[str, Any] = {"attention_dropout": 0.0, "output_router_logits": True}
    options: dict[str, Any] = {}
    if family.name == "deepseek-v3":
        changes["num_nextn_predict_layers"] = 2
        options["mtp_loss_weight"] = 0.5
    if family.name in ("qwen2", "zamba2"):
        del changes["output_router_logits"]
    # In float32 another order of the sums is seen.
    return made(family, "ForCausalLM", **changes).double().train(), options


def gradients(model: Any, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    mask = torch.ones(B, T).long()
    mask[0, :3] = 0
    model(ids, attention_mask=mask, labels=ids, **options).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
@each
def test_gradients_are_those_without(family: Family, way: str) -> None:
    ids = ids_of()
    plain, options = learner(family)
    model = copy.deepcopy(plain)
    told = gradients(plain, ids, **options)
    model.gradient_checkpointing_enable(**WAYS[way])
    runs = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        layer.register_forward_pre_hook(count)
    found = gradients(model, ids, **options)
    n = WAYS[way].get("every_n_layers", 1)
    assert runs == [2 if index % n == 0 else 1 for index in range(len(runs))]
    assert found.keys() == told.keys()
    for name, grad in told.items():
        assert torch.allclose(found[name], grad, rtol=1e-5, atol=1e-6), name
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.zero_grad()
    gradients(model, ids, **options)
    assert runs == [3 if index % n == 0 else 2 for index in range(len(runs))]


@pytest.mark.parametrize("reentrant", [False, True])
@each
def test_what_is_behind_frozen_embeddings_learns(family: Family, reentrant: bool) -> None:
    plain, options = learner(family)
    plain.get_input_embeddings().requires_grad_(False)
    model, ids = copy.deepcopy(plain), ids_of()
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert model.is_activation_checkpointing
    told, found = gradients(plain, ids, **options), gradients(model, ids, **options)
    assert found.keys() == told.keys()
    assert all(torch.allclose(found[n], told[n], rtol=1e-5, atol=1e-6) for n in told)


@each
def test_inputs_can_be_made_to_require_gradients(family: Family) -> None:
    model = made(family, "ForCausalLM").requires_grad_(False)
    ids = ids_of()
    assert not model(ids).logits.requires_grad
    for _ in range(2):
        model.enable_input_require_grads()
    assert model(ids).logits.requires_grad
    with torch.no_grad():
        assert not model(ids).logits.requires_grad
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=2)
    model.disable_input_require_grads()
    assert not model(ids).logits.requires_grad


@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification"])
@each
def test_an_older_config_may_ask_for_it(family: Family, head: str) -> None:
    model = made(family, head, gradient_checkpointing=True)
    assert model.is_gradient_checkpointing
    assert model.supports_gradient_checkpointing
    assert "gradient_checkpointing" not in model.config.to_dict()
    assert not made(family, head, gradient_checkpointing=False).is_gradient_checkpointing
    with pytest.raises(ConfigError, match="gradient_checkpointing='often' has to be true"):
        made(family, head, gradient_checkpointing="often")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"options": {"use_renetrant": False}}, "no option 'use_renetrant'; it has preserve_rng"),
        ({"options": {"use_reentrant": True, "debug": True}}, "no option 'debug'"),
        ({"options": {"every_n_layers": 2}}, "no option 'every_n_layers'.*beside them every_n"),
        ({"options": {"use_reentrant": 1}}, "use_reentrant=1 has to be True or False"),
        ({"options": False}, "options of checkpointing are a bool"),
        ({"every_n_layers": 0}, "every_n_layers=0 has to be an integer of at least 1"),
        ({"every_n_layers": True}, "every_n_layers=True"),
        ({"every_n_layers": 1.5}, "every_n_layers=1.5"),
        ({"offload": "cpu"}, "offload='cpu' has to be True or False"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Recompute(**options)
