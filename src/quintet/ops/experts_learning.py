"""Experts with gradients written in place, keeping little for the backward pass.

Of a token's choice, what its expert made of gate and up is all that is kept beside the inputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.kernels.rows import silu_mul
from quintet.kernels.rows_gradient import silu_gate_gradient
from quintet.ops.again import derived

# On a CPU, a product in bfloat16 is compiled for each number of rows: so there are few of these.
ROWS = 32


def learning_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Sum each token's experts with SiLU by their weights; shapes as in `ops.moe.apply_experts`."""
    dtype = torch.promote_types(x.dtype, gate_up.dtype)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    own = (y.to(dtype) for y in (x, gate_up, down))
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _Experts.apply(indices, weights, *own)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, indices: Tensor, weights: Tensor, x: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        order, counts = _by_expert(indices, len(gate_up))
        step = ROWS if x.dtype.itemsize == 2 else 1
        spans = list(_padded_choices(counts, step))
        inside = x.new_empty(spans[-1][1].stop, gate_up.shape[1])
        out = _zeros(x)
        shares = weights.flatten()[order, None]
        for expert, (rows, places) in enumerate(spans):
            tokens, projected = order[rows] // indices.shape[1], inside[places]
            torch.mm(_taken(x, tokens, len(projected)), gate_up[expert].T, out=projected)
            hidden = _gated(projected) * _taken(shares, rows, len(projected))
            added = hidden.to(x.dtype) @ down[expert].T
            out.index_add_(0, tokens, added[: len(tokens)].to(out.dtype))
        ctx.save_for_backward(indices, weights, x, gate_up, down, inside, order)
        ctx.spans = spans
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, weights, x, gate_up, down, inside, order = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of the gradient is asked for.
            inputs = (weights, x, gate_up, down)

            def formula(*inputs: Tensor) -> Tensor:
                return _by_formula(indices, *inputs)

            return None, *derived(formula, inputs, grad, ctx.needs_input_grad[1:])
        for_x = _zeros(x)
        for_gate_up, for_down = torch.empty_like(gate_up), torch.empty_like(down)
        for_shares = torch.empty_like(order, dtype=for_x.dtype)
        shares = weights.flatten()[order, None]
        for expert, (rows, places) in enumerate(ctx.spans):
            n = rows.stop - rows.start
            if not n:
                for_gate_up[expert], for_down[expert] = 0, 0
                continue
            tokens, projected = order[rows] // indices.shape[1], inside[places]
            expert_grad, given = (_taken(y, tokens, len(projected)) for y in (grad, x))
            share = _taken(shares, rows, len(projected))
            hidden = _gated(projected)
            back = expert_grad @ down[expert]
            for_shares[rows] = (back * hidden)[:n].sum(dim=-1, dtype=for_x.dtype)
            torch.mm(expert_grad.T, (hidden * share).to(x.dtype), out=for_down[expert])
            through = _gated_gradient((back * share).to(x.dtype), projected)
            torch.mm(through.T, given, out=for_gate_up[expert])
            for_x.index_add_(0, tokens, (through @ gate_up[expert])[:n].to(for_x.dtype))
        for_weights = torch.empty_like(for_shares).scatter_(0, order, for_shares)
        found = (
            for_weights.view_as(weights).to(weights.dtype),
            for_x.to(x.dtype),
            for_gate_up,
            for_down,
        )
        needed = ctx.needs_input_grad[1:]
        return None, *(y if need else None for y, need in zip(found, needed, strict=True))


def _by_formula(
    indices: Tensor, weights: Tensor, x: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        share = (weights * (indices == expert)).sum(dim=-1, keepdim=True)
        gate, up = F.linear(x, gate_up[expert]).chunk(2, dim=-1)
        out = out + F.linear(F.silu(gate) * up, down[expert]) * share
    return out


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    output = silu_mul(gate, up)
    return F.silu(gate) * up if output is None else output


def _gated_gradient(grad: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    found = silu_gate_gradient(grad, gate, up)
    if found is None:
        sigmoid = gate.sigmoid()
        found = grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    return torch.cat(found, dim=-1)


def _padded_choices(counts: list[int], step: int) -> Iterator[tuple[slice, slice]]:
    """Yield each expert's choices, padded to a multiple of `step` rows."""
    start = place = 0
    for count in counts:
        size = -(-count // step) * step
        yield slice(start, start + count), slice(place, place + size)
        start, place = start + count, place + size


def _taken(x: Tensor, rows: Tensor | slice, size: int) -> Tensor:
    """Gather `count` rows of (N, C): the named ones, then zeros."""
    found = x[rows]
    return F.pad(found, (0, 0, 0, size - len(found))) if len(found) < size else found


def _by_expert(indices: Tensor, E: int) -> tuple[Tensor, list[int]]:
    flat = indices.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=E).tolist()


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
