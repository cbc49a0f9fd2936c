"""Inputs of `quintet.triton.routing`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from on_triton.cases import Case
from quintet.kernels.routing import Rules
from quintet.ops import routing as ops
from quintet.triton.routing import choose


def logits(device: torch.device, *, N: int, E: int, rules: Rules) -> Mapping[str, Any]:
    g = torch.Generator().manual_seed(E)
    # A slice of something wider.
    x = torch.randn(N, E + 3, generator=g)[:, :E] * 2
    bias = torch.randn(E, generator=g).to(device) / 4 if rules.sigmoid else None
    return {"logits": x.to(device), "rules": rules, "bias": bias}


def by_steps(logits: Tensor, rules: Rules, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose as the definitions do, which are told no more than a configuration says."""
    told = ops.RoutingRules(
        active=rules.active,
        groups=rules.groups,
        kept_groups=rules.kept_groups,
        normalise=rules.normalise,
        scaling=rules.scaling,
    )
    if bias is None:
        return ops._softmax_routing(logits, told)
    return ops._sigmoid_routing(logits, bias, told)


def ordered(choice: Any, **given: Any) -> tuple[Tensor, Tensor] | None:
    """Return experts by their number, and their weights: in which order they come is open."""
    made = choice(**given)
    if made is None:
        return None
    indices, order = made[0].sort(dim=-1)
    return indices, made[1].gather(1, order)


def case(name: str, N: int, E: int, *, compiles: bool = True, **how: Any) -> Case:
    made = partial(logits, N=N, E=E, rules=Rules(**how))
    return Case(name, partial(ordered, choose), partial(ordered, by_steps), made, 1e-6, compiles)


V3 = {"sigmoid": True, "ranked": 2, "normalise": True, "scaling": 2.5}
CASES = [
    case("experts of V3", 3, 256, active=8, groups=8, kept_groups=4, **V3),
    case("experts of V2", 2, 160, active=6, groups=8, kept_groups=3, scaling=16.0),
    case("experts in no groups", 5, 60, active=4, normalise=True, compiles=False),
    case("a group of one expert", 2, 5, active=2, groups=5, kept_groups=3, **V3, compiles=False),
]
