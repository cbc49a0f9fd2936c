"""The activation functions that `hidden_act` can name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.backends import operation
from quintet.errors import ConfigError, shown
from quintet.kernels import rows
from quintet.kernels.rows_gradient import silu_gate_gradient
from quintet.ops.again import Rule, keeping_inputs, learn

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
        raise ConfigError(f"hidden_act={shown(name)} has to be one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gate_by(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """Return act(gate) · up."""
    if act is F.silu:
        return silu_gate(gate, up)
    return gelu_gate(gate, up) if act is F.gelu else act(gate) * up


@operation("silu gate")
def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) · up; both (..., F)."""
    if gate.dtype == up.dtype and learn(gate, up):
        return keeping_inputs(SILU_GATE, gate, up)
    return _silu_by_formula(gate, up)


def _silu_by_formula(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


SILU_GATE = Rule(_silu_by_formula, rows.silu_mul, silu_gate_gradient)


@operation("gelu gate")
def gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Return gelu(gate) · up; both (..., F)."""
    return F.gelu(gate) * up


@operation("sigmoid")
def sigmoid(x: Tensor) -> Tensor:
    """Return σ(x); on kernels, each number is independent of its neighbours."""
    return F.sigmoid(x)
