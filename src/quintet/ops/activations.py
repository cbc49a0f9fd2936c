"""The activation functions that `hidden_act` can name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import ConfigError
from quintet.kernels import rows

__all__ = ["ACTIVATIONS", "Activation", "activation", "gate_by", "sigmoid"]

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_new": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "relu": F.relu,
        "relu2": _relu_squared,
        "sigmoid": F.sigmoid,
        "silu": F.silu,
        "swish": F.silu,
        "tanh": F.tanh,
    }
)


def activation(name: str | Activation) -> Activation:
    """Return the function `hidden_act` names, or the function it already is.

    Raises:
        ConfigError: no activation of that name.
    """
    if not isinstance(name, str):
        return name
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={name!r} has to be one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gate_by(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """Return act(gate) · up."""
    output = None
    if act is F.silu:
        output = rows.silu_mul(gate, up)
    elif act is F.gelu:
        output = rows.gelu_mul(gate, up)
    return act(gate) * up if output is None else output


def sigmoid(x: Tensor) -> Tensor:
    """Return σ(x), on kernels whatever number stands beside which."""
    output = rows.sigmoid(x)
    return F.sigmoid(x) if output is None else output
