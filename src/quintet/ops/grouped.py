"""Grouped matrix products: each group of rows with its own matrix.

Only groups that have rows are read. How many rows each has is data, so a compiler cannot follow
the loop: to `torch.compile` the two functions are operators whose inside it does not look into.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def grouped_linear(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Map the first counts[0] rows by matrices[0], the next counts[1] by matrices[1], and so on.

    Shapes: x (S, I), matrices (E, O, I), counts (E,) that sum to S; returns (S, O).
    """
    out: Tensor = _linear(x, matrices.to(x.dtype), counts)
    return out


# A graph cannot be replayed through either: both read the counts back from the device.
@torch.library.custom_op(
    "quintet::grouped_linear", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _linear(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], matrices.shape[1])
    start = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            rows = slice(start, start + count)
            out[rows] = F.linear(x[rows], matrices[group])
            start += count
    return out


@torch.library.custom_op(
    "quintet::grouped_outer", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Return yᵀx of each group; y (S, O), x (S, I) -> (E, O, I)."""
    out = x.new_zeros(counts.shape[0], y.shape[1], x.shape[1])
    start = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            rows = slice(start, start + count)
            torch.mm(y[rows].T, x[rows], out=out[group])
            start += count
    return out


@_linear.register_fake
def _(x: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[1])


@_outer.register_fake
def _(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], y.shape[1], x.shape[1])


def _remember(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor],
    output: Tensor,
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(
    ctx: torch.autograd.function.BackwardCFunction, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    x, matrices, counts = list(ctx.saved_tensors)
    for_x, for_matrices, _ = list(ctx.needs_input_grad)
    grad = grad.contiguous()
    return (
        _linear(grad, matrices.mT, counts) if for_x else None,
        _outer(grad, x, counts) if for_matrices else None,
        None,
    )


_linear.register_autograd(_backward, setup_context=_remember)
