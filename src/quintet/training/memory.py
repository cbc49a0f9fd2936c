"""The memory of a training: weights, gradients, optimizer states, activations."""

from dataclasses import dataclass

import torch
from torch import nn

from quintet.kernels import native
from quintet.layers.mamba2 import Mamba2
from quintet.layers.moe import Experts
from quintet.modeling.base import PreTrainedModel
from quintet.planning.activations import expert_numbers, numbers_per_map, numbers_per_scan
from quintet.quantization.modules import QuantizedExperts, QuantizedLinear


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a training, in bytes.

    Attributes:
        weights: of the model, as they are held.
        gradients: of those that are trained, in float32 whatever the weights are.
        optimizer: what the optimisers keep, masters included.
        activations: what the backward pass of one part of a step needs, roughly.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(
    model: PreTrainedModel,
    tokens: int,
    optimizer_bytes: int,
    *,
    dtype: torch.dtype | None = None,
    recompute: int = 0,
) -> Memory:
    """Estimate the memory of a training, of a model with weights or on the meta device.

    Activations are what autograd keeps, most of it inputs and outputs of linear maps.

    Args:
        model: with its adapters, and what is frozen frozen.
        tokens: how many tokens of a step are run over at once.
        optimizer_bytes: what the optimisers keep.
        dtype: what linear maps compute in; None for that of the weights.
        recompute: of how many layers each one keeps nothing but its input; 0 for none.
    """
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers()]
    size = (dtype or model.dtype).itemsize
    # Of layers in other processes there is nothing.
    every = model.base_model.get_submodule("layers").children()
    layers = [layer for layer in every if any(True for _ in layer.parameters())]
    # A model without memory will have it in the host's.
    kernels = native.available() and model.device.type in ("cpu", "meta")
    per_layer = [_numbers(layer, model, kernels) for layer in layers]
    width = model.config.hidden_size
    stored = sum(per_layer)
    if recompute:
        saved = [number for i, number in enumerate(per_layer) if i % recompute]
        stored = sum(saved) + max(per_layer, default=0) + width * (len(per_layer) - len(saved))
    return Memory(
        weights=sum(x.nbytes for x in {id(x): x for x in tensors}.values()),
        gradients=sum(4 * p.numel() for p in parameters if p.requires_grad),
        optimizer=optimizer_bytes,
        activations=round(tokens * (stored * size + 3 * width * 4)),
    )


def _numbers(layer: nn.Module, model: PreTrainedModel, kernels: bool) -> float:
    """Return the number of values that a layer keeps per token."""
    active = vars(model.config).get("num_experts_per_tok") or 0
    linear, scan = numbers_per_map(kernels), numbers_per_scan(kernels)
    stored = 0.0
    for module in layer.modules():
        if isinstance(module, nn.Linear | QuantizedLinear):
            stored += linear * (module.in_features + module.out_features)
        elif isinstance(module, Experts) and module.down_proj is not None:
            width, inner = module.down_proj.shape[1:]
            stored += linear * active * expert_numbers(width, inner)
        elif isinstance(module, QuantizedExperts):
            inner, width = module.matrices["gate_up_proj"][0]
            stored += linear * active * expert_numbers(width, inner)
        elif isinstance(module, Mamba2):
            stored += scan * module.in_sizes[0]
    return stored
