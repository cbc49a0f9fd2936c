"""Registers the kernels as a backend of `quintet.ops`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from quintet.backends import Backend, Implementation
from quintet.kernels import (
    attention,
    blocks,
    gated,
    grouped,
    latent,
    linear,
    product,
    routing,
    rows,
    sampling,
    ssm,
)
from quintet.kernels.decode import decode
from quintet.kernels.native import find_recipe
from quintet.kernels.store import BuildError

BF16 = frozenset({torch.bfloat16})
FLOATS = frozenset({torch.bfloat16, torch.float32})


def _decode(q: tuple[Tensor, ...], k: tuple[Tensor, ...], v: Tensor, **how: Any) -> Tensor | None:
    return decode(q[0], k[0], v, **how) if len(q) == len(k) == 1 else None


def _missing() -> str | None:
    try:
        find_recipe()
    except BuildError as error:
        return str(error)
    return None


IMPLEMENTATIONS: Mapping[str, Sequence[Implementation]] = MappingProxyType(
    {
        "attention": (
            Implementation(_decode, FLOATS, "few new tokens a row"),
            Implementation(attention.attend, BF16),
        ),
        "latent attention": (Implementation(latent.attend_latents, BF16),),
        "linear": (
            Implementation(linear.linears, FLOATS, "few vectors"),
            Implementation(product.products, BF16),
        ),
        "quantised linear": (Implementation(linear.linears, FLOATS, "few vectors"),),
        "widen": (Implementation(linear.widen, FLOATS),),
        "blocks": (Implementation(blocks.decode_blocks, FLOATS),),
        "parts of blocks": (Implementation(blocks.split_blocks, FLOATS),),
        "gated mlp": (Implementation(gated.gated, FLOATS, "few tokens"),),
        "gate": (Implementation(product.gated_products, BF16),),
        "experts": (Implementation(grouped.grouped_silu_experts, BF16),),
        "router logits": (Implementation(routing.router_logits, FLOATS, "few tokens"),),
        "choice of experts": (Implementation(routing.choose, FLOATS, "few tokens"),),
        "rms norm": (Implementation(rows.rms_norm, FLOATS),),
        "rotary embedding": (Implementation(rows.rotate, FLOATS),),
        "silu gate": (Implementation(rows.silu_mul, FLOATS),),
        "gelu gate": (Implementation(rows.gelu_mul, BF16),),
        "sigmoid": (Implementation(rows.sigmoid, BF16, "few numbers"),),
        "mamba2": (Implementation(ssm.mamba2, FLOATS),),
        "repetition penalty": (Implementation(sampling.penalise_repetition, FLOATS),),
    }
)
BACKEND = Backend(name="kernels", device="cpu", implementations=IMPLEMENTATIONS, missing=_missing)
