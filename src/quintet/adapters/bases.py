"""The modules adapters apply to, plain or quantised."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quintet.errors import UnsupportedBackendError
from quintet.layers.linear import Linear, LinearMap
from quintet.layers.moe import Experts, ExpertStack
from quintet.quantization import Quantized, QuantizedEmbedding


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear map."""
    return isinstance(module, nn.Linear | LinearMap)


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is an embedding."""
    return isinstance(module, nn.Embedding | QuantizedEmbedding)


def is_experts(module: nn.Module) -> bool:
    """Return whether a module is the experts of a layer."""
    return isinstance(module, ExpertStack)


def shape_of(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the shape of a module's tensor, quantised or not, or None."""
    if isinstance(module, Quantized) and name in module.matrices:
        (rows, columns), stack = module.matrices[name]
        return (stack[0], stack[1] * rows, columns) if stack else (rows, columns)
    tensors: dict[str, Tensor | None] = {**module._buffers, **module._parameters}
    tensor = tensors.get(name)
    # Some formats of other packages keep bytes in a parameter; the map knows its sizes.
    if name == "weight" and isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    return None if tensor is None else tuple(tensor.shape)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's tensors.

    Raises:
        UnsupportedBackendError: nowhere, as they are offloaded.
    """
    tensors = (*module.parameters(), *module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if device.type == "meta":
        raise UnsupportedBackendError(
            f"the weights of a {type(module).__name__} are on the meta device, as offloading "
            "leaves them between forwards: put adapters on a model before it is offloaded"
        )
    return device


def dense(module: nn.Module, name: str) -> Tensor:
    """Return a module's tensor in float32, decoded if needed, without gradient.

    Raises:
        UnsupportedBackendError: it is held in a format that only its package can read.
    """
    if isinstance(module, Quantized) and name in module.matrices:
        return module.decoded(name, torch.float32)
    tensor = module.get_parameter(name)
    if not tensor.is_floating_point() or type(tensor) is not nn.Parameter:
        raise UnsupportedBackendError(
            f"the {name} of a {type(module).__name__} is a {type(tensor).__name__} of "
            f"{tensor.dtype}, whose numbers are not known here: load the model with quantize= of "
            "this library, or without quantisation, for adapters that need them"
        )
    return tensor.detach().to(torch.float32)


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a shallow copy of a module with some tensors replaced."""
    if not tensors:
        return module
    if isinstance(module, Quantized) and not tensors.keys().isdisjoint(module.matrices):
        return _plain(module, tensors)
    other = copy.copy(module)
    other._parameters, other._buffers = dict(module._parameters), dict(module._buffers)
    for name, tensor in tensors.items():
        registry = other._buffers if name in other._buffers else other._parameters
        # What a matrix has become of one that gradients pass is no parameter of anything.
        registry[name] = tensor  # type: ignore[assignment]
    return other


def _plain(module: Quantized, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return an unquantised module with one matrix replaced."""
    plain: nn.Module
    if isinstance(module, QuantizedEmbedding):
        plain = nn.Embedding(1, 1, device="meta")
        plain.num_embeddings, plain.embedding_dim = tensors["weight"].shape
    elif isinstance(module, LinearMap):
        plain = Linear(1, 1, bias=False, device="meta")
        plain.out_features, plain.in_features = tensors["weight"].shape
        plain.bias = module._parameters.get("bias")  # type: ignore[assignment]
    elif isinstance(module, ExpertStack):
        plain = Experts(0, 0, 0, act="silu")
        plain.act_fn = module.act_fn
        plain.num_experts = tensors["down_proj"].shape[0]
    else:
        raise AssertionError(type(module))
    for name, tensor in tensors.items():
        plain._parameters[name] = tensor  # type: ignore[assignment]
    return plain.train(module.training)
