"""Inputs of `quintet.triton.sampling`: rows of scores, options of them, and numbers to draw by."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from on_triton.cases import Case
from quintet.generation.choice import TokenChoice
from quintet.generation.processors.warpers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    stack,
)
from quintet.triton.sampling import draw

__all__ = ["CASES", "by_steps", "rows"]

KINDS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


def rows(
    device: torch.device, *, shape: tuple[int, int], coarse: bool = False, **options: Any
) -> Mapping[str, Any]:
    """Return scores and numbers; options are numbers, or lists of one a row.

    Args:
        coarse: have scores as bfloat16 has them, so that many tie.
    """
    g = torch.Generator().manual_seed(sum(shape))
    B, V = shape
    scores = torch.randn(B, V + 3, generator=g)[:, :V] * 3
    scores = scores.bfloat16().float() if coarse else scores
    values: dict[str, Any] = dict.fromkeys(KINDS)
    for name, value in options.items():
        dtype = torch.long if name == "top_k" else torch.float64
        many = isinstance(value, list)
        values[name] = torch.tensor(value, dtype=dtype)[:, None].to(device) if many else value
    return {"scores": scores.to(device), "u": torch.rand(B, 1, generator=g).to(device), **values}


def by_steps(scores: Tensor, u: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Draw by warping step by step, each row by its own options."""
    warpers = []
    for name, value in options.items():
        if isinstance(value, Tensor):
            warpers.append(stack([KINDS[name](one) for one in value[:, 0].tolist()]))
        elif value is not None:
            warpers.append(KINDS[name](value))
    choice = TokenChoice(warpers, do_sample=True)
    made = choice.launch_taking(choice.warped(scores), u=u)
    return made.tokens, made.best


def case(name: str, *shape: int, compiles: bool = False, **options: Any) -> Case:
    B, V = shape
    return Case(name, draw, by_steps, partial(rows, shape=(B, V), **options), 0.0, compiles)


CASES = [
    case("a draw of all", 3, 70),
    case("a draw of one", 2, 1, top_k=3),
    case("a draw with all options", 2, 5000, temperature=0.7, top_k=50, top_p=0.9, min_p=0.02),
    case("a draw of ties", 4, 500, coarse=True, top_k=40, top_p=0.8),
    case(
        "a draw by options of rows", 3, 90, temperature=[0.5, 1.0, 2.0], top_k=[1, 90, 7],
        top_p=[0.5, 1.0, 0.1], min_p=[0.0, 0.1, 0.3], compiles=True,
    ),
]  # fmt: skip
