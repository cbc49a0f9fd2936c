"""Layers that are compiled in training: in one piece, with the gradients of those that are not."""

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from conformance.families import Family, each
from quintet import LoraConfig
from support import relative_error

# What PyTorch itself looks at as it compiles.
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(1, 25).reshape(2, 12)


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("what", ["plain", "adapter"])
@each
def test_a_layer_is_one_graph(family: Family, what: str) -> None:
    model = family.model_of(**family.shallow)
    if what == "adapter":
        model.add_adapter(LoraConfig(target_modules="all-linear", init_lora_weights=False))
    compiled = copy.deepcopy(model)
    told = gradients(model)
    torch._dynamo.reset()
    for layer in compiled.base_model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    found = gradients(compiled)
    assert found.keys() == told.keys()
    for name, grad in told.items():
        # A key's bias cancels in the softmax.
        assert name.endswith("k_proj.bias") or relative_error(found[name], grad) < 1e-5, name
