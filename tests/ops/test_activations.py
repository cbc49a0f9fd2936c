"""Every activation `hidden_act` can name is the one Transformers has under that name."""

import pytest
import torch
from transformers.activations import ACT2FN

from quintet.errors import ConfigError
from quintet.ops.activations import ACTIVATIONS, activation


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_transformers(name: str) -> None:
    x = torch.cat((torch.linspace(-12, 12, 1001), torch.tensor([0.0, -0.0, 1e4, -1e4])))
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), rtol=1e-6, atol=1e-6)


def test_a_function_is_taken_as_it_is() -> None:
    assert activation(torch.sin) is torch.sin


@pytest.mark.parametrize("name", ["", "SiLU", "prelu"], ids=repr)
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"hidden_act='{name}' .*'gelu_pytorch_tanh'.*'silu'"):
        activation(name)
