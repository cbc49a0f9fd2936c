"""Triton's kernels as a backend: which operations of `quintet.ops` they compute."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from quintet.backends import Backend, Implementation
from quintet.triton import attention, gated, keeping, linear, mamba2, norm, routing, sampling
from quintet.triton.launching import missing

FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})

IMPLEMENTATIONS: Mapping[str, Sequence[Implementation]] = MappingProxyType(
    {
        "attention over pages": (Implementation(attention.attend_pages, FLOATS),),
        "choice of experts": (Implementation(routing.choose, frozenset({torch.float32})),),
        "draw": (Implementation(sampling.draw, frozenset({torch.float32})),),
        "experts": (Implementation(gated.silu_experts, FLOATS),),
        "fp8 linear": (Implementation(linear.linears, FLOATS, "few rows"),),
        "gated mlp": (Implementation(gated.gated, FLOATS),),
        "mamba2": (Implementation(mamba2.mamba2, FLOATS),),
        "mamba2 over texts": (Implementation(mamba2.mix_texts, FLOATS),),
        "quantised linear": (Implementation(linear.linears, FLOATS, "few rows"),),
        "rotate and keep": (Implementation(keeping.rotate_and_keep, FLOATS),),
        "rms norm": (Implementation(norm.rms_norm, FLOATS),),
    }
)
BACKEND = Backend(name="triton", device="cuda", implementations=IMPLEMENTATIONS, missing=missing)
