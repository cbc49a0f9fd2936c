"""Inputs of `quintet.triton.linear`: rows, and weights in all ways to hold them in fewer bits."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from on_triton.cases import Case
from on_triton.experts import BF16, F32, FORMATS, matrix_of, rounding
from quintet.ops.quantized import fp8_linears, quantized_linears
from quintet.quantization.formats import WeightFormat
from quintet.triton.linear import linears

__all__ = ["CASES", "HELD", "maps"]

HELD: Mapping[str, WeightFormat] = {name: one for name, one in FORMATS.items() if one is not None}


def maps(
    device: torch.device,
    *,
    lead: tuple[int, ...],
    sizes: tuple[int, int],
    name: str,
    dtype: torch.dtype,
    bias: bool = True,
) -> Mapping[str, Any]:
    """Return rows and two maps of them; the same each time."""
    (O, I), g = sizes, torch.Generator().manual_seed(sum(sizes) + sum(lead))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=F32)

    x = randn(*lead, I + 8).to(device, dtype)[..., :I]
    weights = [randn(rows, I) / I**0.5 for rows in (O, O + 3)]
    biases = [randn(O).to(device, dtype) if bias else None, None]
    held = HELD[name]
    each = (matrix_of(w, held, device, b) for w, b in zip(weights, biases, strict=True))
    return {"x": x, "maps": list(each)}


def case(
    name: str, lead: tuple[int, ...], sizes: tuple[int, int], dtype: torch.dtype, **how: bool
) -> Case:
    definition = fp8_linears if name.startswith("fp8") else quantized_linears
    inputs = partial(maps, lead=lead, sizes=sizes, name=name, dtype=dtype)
    title = f"{len(lead)} axes of {lead[-1]} by {name}"
    return Case(title, linears, definition.definition, inputs, rounding(dtype), **how)


LIKE = {"compiles": False}
CASES = [
    case("fp8", (2, 9), (130, 200), BF16),
    case("fp8", (1,), (130, 200), F32, **LIKE),
    case("int8", (20,), (33, 70), F32, **LIKE),
    case("int4", (3, 1), (40, 144), BF16),
    case("int4 by 32 with offsets", (1, 2), (7, 90), BF16, **LIKE),
]
