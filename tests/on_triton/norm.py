"""Inputs of `quintet.triton.norm`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from on_triton.cases import Case
from quintet.ops import norm as ops
from quintet.triton.norm import rms_norm

BF16, F32 = torch.bfloat16, torch.float32


def rows(device: torch.device, *, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Any]:
    g = torch.Generator().manual_seed(sum(shape))
    # Every other column of what it is: rows with steps between them.
    x = torch.randn(*shape[:-1], 2 * shape[-1], generator=g).to(device, dtype)[..., : shape[-1]]
    weight = torch.rand(shape[-1], generator=g).to(device, dtype) + 0.5
    return {"x": x, "weight": weight, "eps": 1e-6}


def turned(device: torch.device) -> Mapping[str, Any]:
    given = rows(device, shape=(5, 5), dtype=F32)
    return {**given, "x": given["x"].T.contiguous().T}


def case(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    tolerance = 2e-6 if dtype == F32 else 2**-7
    return Case(
        name, rms_norm, ops.rms_norm.definition, partial(rows, shape=shape, dtype=dtype), tolerance
    )


CASES = [
    case("rows of a power of two", (3, 64), F32),
    case("rows of an odd length", (2, 3, 77), BF16),
    case("one number a row", (5, 1), F32),
    case("no rows", (0, 16), F32),
    Case("numbers apart", rms_norm, ops.rms_norm.definition, turned, 2e-6, compiles=False),
]
