"""Adapters that began as a part of the base model, beside what is left of it, W - s · B₀A₀.

PEFT takes that part from the weights when such an adapter is loaded. Here they stay as they are,
and the adapter is one of twice the rank, W + s · (BA - B₀A₀), for the original model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from quintet.adapters.bases import dense, is_linear
from quintet.adapters.config import LoraConfig
from quintet.adapters.layout import ModuleLayout
from quintet.adapters.lowrank import LowRank
from quintet.adapters.reading import Adaptations
from quintet.errors import UnsupportedModelError, shown

Beginning = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


def _largest(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA (arXiv:2404.02948): s · B₀A₀ is the nearest matrix of the rank."""
    wide = weight.to(torch.float64)
    tall = wide.shape[0] > wide.shape[1]
    _, vectors = torch.linalg.eigh(wide.mT @ wide if tall else wide @ wide.mT)
    own = vectors[:, -rank:]
    A, B = (own.mT, wide @ own) if tall else (own.mT @ wide, own)
    return A, B / scale


def _first(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """OLoRA (arXiv:2406.01775): the first columns and rows of W = QR."""
    Q, R = torch.linalg.qr(weight)
    return R[:rank], Q[:, :rank]


BEGINNINGS: Mapping[str, Beginning] = MappingProxyType({"pissa": _largest, "olora": _first})


def of_original(layout: ModuleLayout, config: LoraConfig, adaptations: Adaptations) -> LoraConfig:
    """Make an adapter one of the original model, and return its config, changed likewise.

    Raises:
        UnsupportedModelError: it changes something else than linear maps.
    """
    start = config.init_lora_weights
    begin = BEGINNINGS.get(start.lower()) if isinstance(start, str) else None
    if begin is None:
        return config
    paths = {(spot.module, spot.use): layout.named(spot.path) for spot in layout}
    for (module, use), adaptation in adaptations.items():
        if adaptation.experts or (adaptation.added and not is_linear(module)):
            raise UnsupportedModelError(
                f"init_lora_weights={start!r} of {shown(paths[module, use])}, which is no linear "
                "map, is not read; load both in PEFT, merge_and_unload(), and save the model"
            )
        lora = adaptation.addition("weight")
        if isinstance(lora, LowRank):
            _take_away(lora, begin(dense(module, "weight"), lora.rank, lora.scale))
    # Twice the rank, at the same scale.
    by = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=by * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: by * alpha for key, alpha in config.alpha_pattern.items()},
    )


def _take_away(lora: LowRank, part: tuple[Tensor, Tensor]) -> None:
    A, B = (matrix.to(lora.lora_A.dtype) for matrix in part)
    with torch.no_grad():
        lora.lora_A = nn.Parameter(torch.cat((lora.lora_A, A)))
        lora.lora_B = nn.Parameter(torch.cat((lora.lora_B, -B), dim=1))
