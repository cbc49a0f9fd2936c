"""Random weights at full speed, and caches that are full without a prompt.

What a forward costs does not depend on the values it computes with, as long as they are ordinary
numbers; only the choice of experts does, and of random ones about every choice is equally likely.
"""

import torch
from torch import Tensor, nn

from quintet.auto import AutoModelForCausalLM
from quintet.cache import Cache
from quintet.configuration import PreTrainedConfig
from quintet.modeling.base import PreTrainedModel
from quintet.modeling.heads import CausalLMHead

# Drawn once and repeated: drawing billions of numbers takes longer than anything measured. A prime
# number of them, so that no two rows of a matrix are the same.
_DRAWN = 8_388_593


@torch.no_grad()
def random_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> CausalLMHead:
    """Return a language model with random weights, made on a device without drawing each."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, CausalLMHead)
    normals = _normals(model, dtype, seed).to(device)
    tied = model.tied_names()
    for name, old in list(model.state_dict(keep_vars=True).items()):
        if name in tied:
            continue
        stored = torch.float32 if name.endswith(model.keep_in_fp32) else dtype
        new = torch.empty(old.shape, dtype=stored, device=device)
        if new.ndim > 1:
            _draw(new, normals)
        else:
            # Norms, biases and the scalars of state-space layers: near the neutral value.
            new.fill_(0.0 if name.endswith("bias") else 1.0)
        _replace(model, name, new)
    model.tie_weights()
    # What is no part of a checkpoint, as frequencies.
    return model.to(device).eval()


def random_ids(vocab_size: int, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Return deterministic ids (batch, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, vocab_size, (batch, tokens), generator=generator, device="cpu", dtype=torch.long
    )


@torch.no_grad()
def filled_cache(model: CausalLMHead, batch: int, depth: int, cache: Cache | None = None) -> Cache:
    """Return a cache whose rows hold `depth` tokens, all but the first with random keys and values.

    One token runs through the model, which shows what each layer keeps; recurrent states, which
    have no depth, stay as it leaves them.

    Args:
        cache: an empty one to fill; by default of the kind that the model grows.
    """
    cache = model.new_cache() if cache is None else cache
    ids = random_ids(model.config.vocab_size, batch, 1).to(model.device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if depth > 1:
        segment = cache.segment(batch, depth - 1, model.device, None)
        for slot in cache.layers:
            if slot is not None:
                keys, values = (_longer(x, depth - 1) for x in slot.content(1))
                slot.update(keys, values, segment)
        cache.advance(segment)
    return cache


def _longer(x: Tensor, length: int) -> Tensor:
    """Return random numbers like x (B, K, 1, D), (B, K, length, D)."""
    new = x.new_empty(*x.shape[:2], length, x.shape[3])
    drawn = torch.randn(min(new.numel(), _DRAWN), dtype=torch.float32, device="cpu")
    return _draw(new, drawn.to(x))


def _normals(model: PreTrainedModel, dtype: torch.dtype, seed: int) -> Tensor:
    drawn = torch.randn(
        _DRAWN, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    )
    return (drawn * model.config.initializer_range).to(dtype)


def _draw(tensor: Tensor, numbers: Tensor) -> Tensor:
    """Fill a tensor with `numbers`, repeated."""
    for part in torch.split(tensor.view(-1), len(numbers)):
        part.copy_(numbers[: len(part)])
    return tensor


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        module.register_buffer(leaf, tensor)
