"""What GPTQ and AWQ are, in a few lines each: a weight becomes the tensors of a file."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.families import Family

__all__ = ["WIDTHS", "awq", "gptq", "packed_checkpoint", "words"]


# Widths that words of 32 bits divide.
WIDTHS: dict[str, dict[str, int]] = {
    "qwen2": {},
    "qwen2-moe": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 32},
    "deepseek-v2": {"moe_intermediate_size": 24, "q_lora_rank": 24},
    "deepseek-v3": {"moe_intermediate_size": 24, "q_lora_rank": 24},
}


def words(numbers: Tensor, bits: int) -> Tensor:
    """Pack numbers (..., N) into int32, the first in the lowest bits."""
    each = 32 // bits
    packed = torch.zeros((*numbers.shape[:-1], -(-numbers.shape[-1] // each)), dtype=torch.int64)
    for i in range(numbers.shape[-1]):
        packed[..., i // each] |= numbers[..., i].to(torch.int64) << bits * (i % each)
    return packed.to(torch.uint32).view(torch.int32)


def rounded(
    weight: Tensor, bits: int, index: Tensor, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (O, I), scales and zero points (O, G) of a weight."""
    O, groups = weight.shape[0], int(index.max()) + 1
    levels = torch.empty(weight.shape, dtype=torch.int64)
    scales, zeros = torch.empty(O, groups, dtype=scale_dtype), torch.empty(O, groups)
    for g in range(groups):
        part = weight[:, index == g]
        low, high = part.amin(1).clamp(max=-1e-3), part.amax(1).clamp(min=1e-3)
        if symmetric:
            scale = torch.maximum(-low, high) / 2 ** (bits - 1)
            zero = torch.full((O,), 2.0 ** (bits - 1))
        else:
            scale = (high - low) / (2**bits - 1)
            zero = (-low / scale).round().clamp(1, 2**bits - 1)
        scales[:, g], zeros[:, g] = scale.to(scale_dtype), zero
        steps = (part / scales[:, g, None].float() + zero[:, None]).round()
        levels[:, index == g] = steps.clamp(0, 2**bits - 1).to(torch.int64)
    return levels, scales, zeros.to(torch.int64)


def meant(levels: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    return scales[:, index].float() * (levels - zeros[:, index])


def gptq(
    weight: Tensor,
    *,
    bits: int = 4,
    group: int = 64,
    symmetric: bool = True,
    shuffled: bool = False,
    stored_less_one: bool = True,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a matrix by their endings, and the weight they stand for."""
    O, I = weight.shape
    index = torch.arange(I) // (I if group == -1 else group)
    if shuffled:
        index = index[torch.randperm(I)]
    levels, scales, zeros = rounded(weight.float(), bits, index, symmetric, scale_dtype)
    padded = torch.nn.functional.pad(levels, (0, 0, 0, -O % (32 // bits)))
    stored = torch.nn.functional.pad(zeros - int(stored_less_one), (0, 0, 0, -O % (32 // bits)))
    if symmetric:
        stored[O:] = stored[0, 0]
    tensors = {
        "qweight": words(padded, bits).T.contiguous(),
        "qzeros": words(stored.T, bits),
        "scales": torch.nn.functional.pad(scales.T, (0, padded.shape[0] - O)).contiguous(),
        "g_idx": index.to(torch.int32),
    }
    return tensors, meant(levels, scales, zeros, index)


def awq(
    weight: Tensor, *, group: int = 64, symmetric: bool = False, **_: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a matrix by their endings, and the weight they stand for."""
    columns = weight.shape[1]
    index = torch.arange(columns) // (columns if group == -1 else group)
    levels, scales, zeros = rounded(weight.float(), 4, index, symmetric, torch.float16)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(numbers: Tensor) -> Tensor:
        return words(numbers.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4)

    tensors = {
        "qweight": packed(levels.T),
        "qzeros": packed(zeros.T),
        "scales": scales.T.contiguous(),
    }
    return tensors, meant(levels, scales, zeros, index)


def packed_checkpoint(
    family: Family,
    root: Path,
    pack: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]],
    settings: Mapping[str, Any],
    *,
    also: tuple[str, ...] = (),
    **changes: Any,
) -> Any:
    """Write a family's model packed into `root`, and return one of the numbers it stands for.

    Args:
        pack: makes tensors by what follows a module's path, and their numbers, of a weight.
        settings: the quantization_config.
        also: endings of names that are packed beside those of the layers' projections.
    """
    model = family.model_of(**changes)
    model.save_pretrained(root)
    tensors, plain = load_file(root / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith(("_proj.weight", "_mqa.weight", *also))]:
        path, weight = name.removesuffix("weight"), tensors.pop(name)
        parts, plain[name] = pack(path, weight)
        tensors |= {path + ending: part for ending, part in parts.items()}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"] = dict(settings)
    (root / "config.json").write_text(json.dumps(config))
    rest = {name: t for name, t in tensors.items() if name not in packed_names(tensors, plain)}
    return type(model).from_pretrained(None, config=model.config, state_dict={**rest, **plain})


def packed_names(tensors: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> set[str]:
    paths = {name.removesuffix("weight") for name in plain}
    return {
        name
        for name in tensors
        if name.rpartition(".")[0] + "." in paths and not name.endswith(".bias")
    }
