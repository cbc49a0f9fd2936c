"""Lower bounds of a forward: bytes to read, and multiplications.

A decode step reads every weight it uses once, each time it uses it: a block that several layers
share is too large to stay in the CPU's caches until its next use. Of stacked experts it reads those
that were hit, of an embedding the rows of its tokens. It reads the keys and values of all tokens
before, and reads and writes recurrent states.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor, nn

from quintet.auto import AutoModelForCausalLM
from quintet.cache import Cache
from quintet.configuration import PreTrainedConfig
from quintet.layers.moe import Experts
from quintet.layers.shared_transformer import AdapterMaps
from quintet.modeling.decoder import DecoderModel
from quintet.modeling.heads import CausalLMHead
from quintet.quantization.modules import QuantizedEmbedding, QuantizedExperts


@dataclass(frozen=True, slots=True)
class StepBytes:
    """The bytes read by one decode step of a batch.

    Attributes:
        weights: with the experts that as many uniformly routed tokens hit on average.
        cache: keys and values, or latents, as they are stored.
        states: recurrent states, counted twice, for they are written as well.
    """

    weights: int
    cache: int
    states: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.states


def step_bytes(model: CausalLMHead, cache: Cache, batch: int, depth: int) -> StepBytes:
    """Count the bytes a step of `batch` tokens reads at `depth`, given a cache of one token."""
    cached = 0
    for slot, window in zip(cache.layers, _windows(model), strict=True):
        if slot is not None:
            cached += slot.nbytes * min(depth, window or depth)
    return StepBytes(
        weights=round(_decoder(model, _bytes, batch) + _bytes(model.get_output_embeddings())),
        cache=cached,
        states=2 * sum(slot.nbytes for slot in cache.states if slot is not None),
    )


def prompt_flops(config: PreTrainedConfig, batch: int, tokens: int) -> float:
    """Count two for each multiplication by a weight that a prompt takes; logits of its end alone.

    Attention's own products and the scans of recurrent layers are not counted, so that what is
    reached of a peak is rather understated.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, CausalLMHead)
    per_token = _decoder(model, _products, 1)
    return 2 * batch * (tokens * per_token + _products(model.get_output_embeddings()))


def token_products(model: CausalLMHead, ahead: bool = False) -> float:
    """Count the multiplications by weights for one token and its logits.

    With `ahead` those of prediction layers, each with logits of its own, are counted, too.
    """
    return _all(model, _products, ahead)


def learned_products(model: CausalLMHead, ahead: bool = False) -> float:
    """Count the same, by those weights alone that have a gradient."""
    return _all(model, _learned, ahead)


def _all(model: CausalLMHead, own: Callable[[nn.Module], float], ahead: bool) -> float:
    active = vars(model.config).get("num_experts_per_tok") or 0
    layers = model.base_model.get_submodule("layers")
    behind = list(islice(layers.children(), model.config.num_hidden_layers, None)) if ahead else []
    # A prediction layer has the head among its own modules.
    further = sum(_inside(layer, own, 1, active) for layer in behind)
    return _decoder(model, own, 1) + own(model.get_output_embeddings()) + further


def _bytes(module: nn.Module) -> float:
    """Return the bytes of a module's own tensors."""
    return sum(x.nbytes for x in _tensors(module))


def _products(module: nn.Module) -> float:
    """Count the multiplications by a module's own weights for one token."""
    if isinstance(module, nn.Embedding):
        return 0
    return sum(x.numel() for x in _tensors(module) if x.ndim > 1)


def _learned(module: nn.Module) -> float:
    """Count the multiplications by those of a module's own weights that have a gradient."""
    if isinstance(module, nn.Embedding):
        return 0
    return sum(x.numel() for x in module.parameters(recurse=False) if _has_gradient(x))


def _has_gradient(x: Tensor) -> bool:
    return x.ndim > 1 and x.requires_grad


def _decoder(model: CausalLMHead, own: Callable[[nn.Module], float], tokens: int) -> float:
    """Sum `own` of the modules below the head, as a forward of `tokens` tokens uses them."""
    active = vars(model.config).get("num_experts_per_tok") or 0
    total = 0.0
    for name, child in model.base_model.named_children():
        # A family may keep further layers behind, which are no part of this run.
        several = islice(child.children(), model.config.num_hidden_layers)
        parts = several if name == "layers" else [child]
        total += sum(_inside(part, own, tokens, active) for part in parts)
    return total


def _inside(
    module: nn.Module, own: Callable[[nn.Module], float], tokens: int, active: int
) -> float:
    if isinstance(module, nn.Embedding | QuantizedEmbedding):
        return own(module) * tokens / module.num_embeddings
    if isinstance(module, Experts | QuantizedExperts):
        missed = (1 - active / module.num_experts) ** tokens
        return own(module) * (1 - missed)
    parts = [_inside(child, own, tokens, active) for child in module.children()]
    return own(module) + (
        sum(parts) / len(parts) if isinstance(module, AdapterMaps) else sum(parts)
    )


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))


def _windows(model: CausalLMHead) -> list[int | None]:
    base = model.base_model
    assert isinstance(base, DecoderModel)
    windows = list(base.windows)
    layers = model.config.num_hidden_layers
    return windows if len(windows) == layers else windows * layers
