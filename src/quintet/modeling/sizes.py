"""The memory of a model, computed from its config alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from quintet.layers.moe import Experts
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.init_on_meta import init_on_meta
from quintet.modeling.placement import ModelPart, parts
from quintet.quantization import Scheme


@dataclass(frozen=True, slots=True)
class Size:
    """The memory that a model needs.

    Attributes:
        parameters: all of them, shared ones once.
        active: those that a token meets: of experts the chosen ones, no prediction layers.
        parts: what lies on one device each, with its bytes.
        cache_per_token: the numbers that the cache holds for each token of a row.
        state_per_row: the numbers that it holds for each row besides.
        width: the most numbers of one token that are there at once within a layer.
    """

    parameters: int
    active: int
    parts: tuple[ModelPart, ...]
    cache_per_token: int
    state_per_row: int
    width: int

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights."""
        return sum(part.nbytes for part in self.parts)

    def cache_bytes(self, batch: int, context: int, itemsize: int) -> int:
        """Return the cache's bytes for `batch` rows of `context` tokens.

        Recurrent states are kept in float32.
        """
        return batch * (context * self.cache_per_token * itemsize + 4 * self.state_per_row)

    def working_bytes(self, batch: int, tokens: int, itemsize: int) -> int:
        """Estimate the activations of a forward of `tokens` tokens per row."""
        return batch * tokens * self.width * itemsize


def measure(model: PreTrainedModel, dtype: torch.dtype, scheme: Scheme | None = None) -> Size:
    """Measure a model, on any device; `scheme` is the quantisation of its weights.

    Where several processes have its layers, it is the whole that is measured.
    """
    if model.stage is not None:
        model = init_on_meta(type(model), model.config)
    total = model.num_parameters()
    prediction = _prediction_layers(model)
    main = {id(p) for p in _others(model, prediction)}
    own = {id(p): p for layer in prediction for p in layer.parameters() if id(p) not in main}
    idle = sum(p.numel() for p in own.values())
    inside = {id(module) for layer in prediction for module in layer.modules()}
    chosen = vars(model.config).get("num_experts_per_tok")
    for module in model.modules():
        if isinstance(module, Experts) and id(module) not in inside:
            E = module.down_proj.shape[0]
            expert_size = sum(p.numel() for p in module.parameters()) // E
            idle += expert_size * (E - min(chosen or E, E))
    per_token, per_row = model.config.cache_numbers()
    width = _width(model)
    if scheme is not None:
        model.quantize_modules(scheme, dtype)
        model.tie_weights()
    sized = parts(model, dtype, model.keep_in_fp32)
    return Size(total, total - idle, tuple(sized), per_token, per_row, width)


def _prediction_layers(model: PreTrainedModel) -> list[nn.Module]:
    layers = model.base_model.get_submodule("layers")
    return list(layers.children())[model.config.num_hidden_layers :]


def _others(model: PreTrainedModel, prediction: list[nn.Module]) -> Iterator[nn.Parameter]:
    """Yield the parameters of the main run, without prediction layers."""
    layers = model.base_model.get_submodule("layers")
    for module in (model, *model.children(), *model.base_model.children(), *layers.children()):
        if module not in prediction and not any(layer in module.modules() for layer in prediction):
            yield from module.parameters()


def _width(model: PreTrainedModel) -> int:
    """Return twice the hidden size plus the largest input and output of a layer's map."""
    C = model.config.hidden_size
    layers = model.base_model.get_submodule("layers")
    widest = [m.in_features + m.out_features for m in layers.modules() if isinstance(m, nn.Linear)]
    return 2 * C + max(widest, default=0)
