"""Operations that keep only their inputs for the backward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quintet.kernels.calls import PLAIN
from quintet.kernels.native import available
from quintet.ops.transforms import recorded, transformed

FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule to compute an operation and its gradient; see `keeping_inputs`.

    Attributes:
        formula: defines it, from the inputs.
        compute: the same in one pass, or None if it does not apply.
        derive: from a gradient of the result and the inputs to those of the inputs, or None.
    """

    formula: Callable[..., Tensor]
    compute: Callable[..., Tensor | None]
    derive: Callable[..., Sequence[Tensor | None] | None]


def learn(*tensors: Tensor | None) -> bool:
    """Return whether a tensor requires a gradient and kernels can compute it."""
    given = [x for x in tensors if x is not None]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in given):
        return False
    if recorded() or transformed():
        return False
    plain = all(type(x) in PLAIN and x.is_cpu and x.dtype in FLOATS for x in given)
    return plain and available()


def keeping_inputs(rule: Rule, *inputs: Tensor | None) -> Tensor:
    """Compute by a rule, keeping only the inputs for the backward pass."""
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _KeepingInputs.apply(rule, *inputs)  # type: ignore[no-untyped-call]
    return out


class _KeepingInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, *inputs: Tensor | None) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(*inputs)
        output = rule.compute(*inputs)
        return rule.formula(*inputs) if output is None else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        # Where a gradient of the gradient is asked for, the formula is recorded.
        found = None if torch.is_grad_enabled() else ctx.rule.derive(grad, *inputs)
        if found is None:
            return None, *derived(ctx.rule.formula, inputs, grad, needed)
        pairs = zip(found, inputs, needed, strict=True)
        return None, *(
            x.to(source.dtype) if x is not None and need else None for x, source, need in pairs
        )


def derived(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of `function(*inputs)` by running it again.

    Where a gradient of the gradient is asked for, they are recorded themselves.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        own = (
            inputs
            if differentiable
            else [x if x is None else x.detach().requires_grad_() for x in inputs]
        )
        wanted = [x for x, need in zip(own, needed, strict=True) if need and x is not None]
        found = iter(torch.autograd.grad(function(*own), wanted, grad, create_graph=differentiable))
    return [next(found) if need else None for need in needed]
