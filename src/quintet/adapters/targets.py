"""New adapters: the targeted modules and the initial weights."""

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from quintet.adapters.adaptation import EXPERT_STACKS, Adaptation
from quintet.adapters.bases import dense, device_of, is_embedding, is_experts, is_linear, shape_of
from quintet.adapters.config import KNOWN_PARTS, LoraConfig
from quintet.adapters.layout import ModuleLayout, Spot
from quintet.adapters.lowrank import EmbeddingLowRank, ExpertStackLowRank, LowRank, NewRows
from quintet.adapters.reading import Adaptations, tie
from quintet.errors import InputError, UnsupportedModelError, listed, shown

ALL_LINEAR = "all-linear"


def targeted(layout: ModuleLayout, config: LoraConfig) -> list[Spot]:
    """Return the modules that a config targets."""
    found = []
    for spot in layout:
        path = layout.named(spot.path)
        if config.saves(path) or _is_named(config.exclude_modules, path):
            continue
        if config.target_modules == ALL_LINEAR:
            wanted = is_linear(spot.module) and spot.path not in layout.heads
        else:
            wanted = _is_named(config.target_modules, path) and _is_in_layers(config, path)
        if wanted:
            found.append(spot)
    return found


def expected(layout: ModuleLayout, config: LoraConfig) -> Iterator[str]:
    """Yield the modules and biases that a config has files for."""
    lora = targeted(layout, config)
    yield from (layout.named(spot.path) for spot in lora)
    given = config.trainable_token_indices
    rows = [*given] if isinstance(given, dict) else ["embed_tokens"] if given else []
    for spot in layout:
        path, parameters = layout.named(spot.path), spot.module._parameters
        stacks = tuple(EXPERT_STACKS) if is_experts(spot.module) else ()
        changed = [f"{path}.{name}" for name in (*parameters, *stacks)]
        # A tied head may be written once, as the embedding.
        twice = layout.tied is not None and spot.path == layout.tied[0]
        if (
            (config.saves(path) and _is_replaced(spot) and not twice)
            or _is_named(rows, spot.path)
            or any(_is_named(config.target_parameters, name) for name in changed)
        ):
            yield path
        if spot.module._parameters.get("bias") is not None and _has_bias(config, lora=spot in lora):
            yield f"{path}.bias"


def new_adapter(layout: ModuleLayout, config: LoraConfig) -> Adaptations:
    """Make an untrained adapter, which has no effect unless `init_lora_weights=False`.

    Raises:
        InputError: the configuration targets nothing, or a module that cannot have an adapter.
        UnsupportedModelError: it targets one that cannot have one of its kind.
    """
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() in KNOWN_PARTS:
        raise UnsupportedModelError(
            f"init_lora_weights={start!r} takes a part out of the base model, which is only read "
            "and not begun here; PEFT itself can put it on a model of this library (get_peft_model)"
        )
    adaptations: Adaptations = {}

    def adaptation_of(spot: Spot) -> Adaptation:
        return adaptations.setdefault((spot.module, spot.use), Adaptation())

    for spot in targeted(layout, config):
        path = layout.named(spot.path)
        if not is_linear(spot.module) and not is_embedding(spot.module):
            raise InputError(
                f"target_modules names {path}, a {type(spot.module).__name__}; an adapter of low "
                "rank is of a linear map or an embedding (for experts, see target_parameters)"
            )
        adaptation_of(spot).added["weight"] = _matrix(config, spot, path, "weight")
    for spot, name in _parameters(layout, config):
        path = layout.named(spot.path)
        if is_experts(spot.module):
            adaptation_of(spot).added[name] = _stack(config, spot, path, name)
        else:
            adaptation_of(spot).added[name] = _matrix(config, spot, path, name)
    if not adaptations and not config.modules_to_save and not config.trainable_token_indices:
        names = sorted({spot.path.rpartition(".")[2] for spot in layout if is_linear(spot.module)})
        raise InputError(
            f"target_modules={config.target_modules} and target_parameters="
            f"{config.target_parameters} name nothing in this model; its linear maps are\n"
            f"{listed(names, most=20)}"
        )
    for spot, name, tensor in _own(layout, config, adaptations):
        adaptation_of(spot).instead[name] = nn.Parameter(tensor.detach().clone())
    for spot, ids in _tokens(layout, config):
        rows = dense(spot.module, "weight")[ids]
        adaptation_of(spot).rows = NewRows(
            torch.tensor(ids, dtype=torch.long, device=rows.device), rows
        )
    tie(layout, adaptations)
    return adaptations


def _is_named(names: list[str] | str | None, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or ())


def _has_bias(config: LoraConfig, *, lora: bool) -> bool:
    """Return whether the bias of a module, with or without an addition, is the adapter's own."""
    return config.bias == "all" or (config.bias == "lora_only" and lora)


def _is_replaced(spot: Spot) -> bool:
    """Return whether a module that is saved whole has tensors of its own."""
    has_parameters = any(parameter is not None for parameter in spot.module._parameters.values())
    return has_parameters or shape_of(spot.module, "weight") is not None


def _is_in_layers(config: LoraConfig, path: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == [] or isinstance(config.target_modules, str):
        return True
    patterns = config.layers_pattern or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", path) for pattern in patterns)
    # A pattern may have groups of its own, before the one of the number.
    number = next((int(match[match.re.groups]) for match in found if match), None)
    return number in ([layers] if isinstance(layers, int) else layers)


def _parameters(layout: ModuleLayout, config: LoraConfig) -> Iterator[tuple[Spot, str]]:
    for spot in layout:
        names = [*spot.module._parameters, *(EXPERT_STACKS if is_experts(spot.module) else ())]
        for name in dict.fromkeys(names):
            if not _is_named(config.target_parameters, f"{layout.named(spot.path)}.{name}"):
                continue
            shape = shape_of(spot.module, name) or ()
            if not (is_experts(spot.module) or (len(shape) == 2 and not is_embedding(spot.module))):
                raise InputError(
                    f"target_parameters names {spot.path}.{name} of shape {list(shape)}; an "
                    "adapter of low rank is of a matrix, or of the stacked matrices of experts"
                )
            if config.use_dora or config.lora_bias or config.lora_dropout:
                raise UnsupportedModelError(
                    f"{spot.path}.{name} is a parameter and not a map: use_dora, lora_bias and "
                    "lora_dropout cannot be with it"
                )
            yield spot, name


def _own(
    layout: ModuleLayout, config: LoraConfig, adaptations: Adaptations
) -> Iterator[tuple[Spot, str, Tensor]]:
    """Yield the tensors an adapter replaces from the start."""
    for spot in layout:
        path = layout.named(spot.path)
        lora = bool((found := adaptations.get((spot.module, spot.use))) and found.added)
        for name, parameter in spot.module._parameters.items():
            biases = name == "bias" and _has_bias(config, lora=lora)
            if parameter is not None and (config.saves(path) or biases):
                yield spot, name, parameter
        if config.saves(path) and _is_replaced(spot) and not spot.module._parameters:
            yield spot, "weight", dense(spot.module, "weight")


def _tokens(layout: ModuleLayout, config: LoraConfig) -> Iterator[tuple[Spot, list[int]]]:
    given = config.trainable_token_indices
    if not given:
        return
    by_name = given if isinstance(given, dict) else {"embed_tokens": given}
    for name, ids in by_name.items():
        spots = [s for s in layout if is_embedding(s.module) and _is_named([name], s.path)]
        if not spots or len(set(ids)) < len(ids):
            raise InputError(
                f"trainable_token_indices names {shown(name)} with {shown(ids)}; it has to be an "
                "embedding, and each id once"
            )
        V = (shape_of(spots[0].module, "weight") or (0,))[0]
        if not ids or max(ids) >= V:
            raise InputError(f"trainable_token_indices={ids} and there are {V} ids")
        yield spots[0], ids


def _matrix(config: LoraConfig, spot: Spot, path: str, name: str) -> LowRank | EmbeddingLowRank:
    shape = shape_of(spot.module, name)
    assert shape is not None
    device, rank = device_of(spot.module), config.rank(path)
    scale = config.scale(path, rank)
    if is_embedding(spot.module):
        V, C = shape
        A = torch.zeros(rank, V, device=device, dtype=torch.float32)
        B = torch.randn(C, rank, device=device, dtype=torch.float32)
        embedding = EmbeddingLowRank(A, B, scale)
        if config.init_lora_weights is False:
            nn.init.normal_(embedding.lora_A)
        if config.use_dora:
            whole = dense(spot.module, name)
            whole = (whole + embedding.change(whole).detach()).T
            embedding.magnitude = nn.Parameter(whole.norm(dim=1))
        return embedding
    O, I = shape
    A, B = _first(config, rank, I, O, device)
    bias = torch.zeros(O, device=device, dtype=torch.float32) if config.lora_bias else None
    lora = LowRank(A, B, scale, bias=bias, dropout=config.lora_dropout)
    if config.use_dora:
        whole = dense(spot.module, name)
        whole = whole + lora.change(whole).detach()
        lora.magnitude = nn.Parameter(whole.norm(dim=1))
    return lora


def _stack(config: LoraConfig, spot: Spot, path: str, name: str) -> ExpertStackLowRank:
    shape = shape_of(spot.module, name)
    assert shape is not None
    E, O, I = shape
    rank = config.rank(path)
    A, B = _first(config, E * rank, I, O, device_of(spot.module))
    return ExpertStackLowRank(A, B, E, config.scale(path, rank))


def _first(
    config: LoraConfig, rank: int, I: int, O: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return A and B as PEFT initialises them."""
    A = torch.empty(rank, I, device=device, dtype=torch.float32)
    B = torch.zeros(O, rank, device=device, dtype=torch.float32)
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if config.init_lora_weights is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    return A, B
