"""Entry and exit of tensor-parallel regions.

f is the identity forward and a sum over the processes backward, g the reverse (arXiv:1909.08053,
§3). All work on plain tensors, with or without gradients.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from quintet.parallel.shared_buffer import join, shared_buffer_of, sum_in_place


class _Context(Protocol):
    group: dist.ProcessGroup
    own: tuple[int, int]


def copied(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Apply f: return x for a partial use in each process; its gradients are summed."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _Copied.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Apply g: return the sum of the processes' x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Reduced.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]
    return _sum(x, group)


def gathered(x: Tensor, group: dist.ProcessGroup, *, widths: list[int], dim: int = -1) -> Tensor:
    """Join the processes' x along a dimension, `widths` of each; backward each gets its own part.

    That is the gradient of what all processes compute alike from the whole.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gathered.apply(x, group, widths, dim)  # type: ignore[no-any-return, no-untyped-call]
    return _join(x, group, widths, dim)


def entered(x: Tensor, group: dist.ProcessGroup, *, widths: list[int], dim: int = -1) -> Tensor:
    """Join parts as `gathered` does, for a partial use; the gradient is a part of the sum.

    That is f of what is gathered; with `scattered`, what f and g are where tokens are divided
    (arXiv:2205.05198, §4.2.2).
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Entered.apply(x, group, widths, dim)  # type: ignore[no-any-return, no-untyped-call]
    return _join(x, group, widths, dim)


def scattered(x: Tensor, group: dist.ProcessGroup, *, widths: list[int], dim: int = -1) -> Tensor:
    """Return this process's part of the sum of the processes' x; backward the parts are joined."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Scattered.apply(x, group, widths, dim)  # type: ignore[no-any-return, no-untyped-call]
    return _scatter(x, group, widths, dim)


def sliced(x: Tensor, group: dist.ProcessGroup, *, widths: list[int], dim: int = -1) -> Tensor:
    """Return this process's part of x, which all have; backward all get each other's gradients."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Sliced.apply(x, group, widths, dim)  # type: ignore[no-any-return, no-untyped-call]
    return _own(x, group, widths, dim)


def _own(x: Tensor, group: dist.ProcessGroup, widths: list[int], dim: int) -> Tensor:
    index = dist.get_rank(group)
    return x.narrow(dim, sum(widths[:index]), widths[index])


def exchanged(x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    """Send each process its rows of x, `sent[i]` in order, and return the `received` from each."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Exchanged.apply(x, group, sent, received)  # type: ignore[no-any-return, no-untyped-call]
    return _exchange(x, group, sent, received)


def _exchange(x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    rows = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(rows, x.detach().contiguous(), received, sent, group=group)
    return rows


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    sum_in_place(total, group)
    return total


def _join(x: Tensor, group: dist.ProcessGroup, widths: list[int], dim: int) -> Tensor:
    # Collectives want tensors of one shape: the narrower are filled up, and cut again.
    moved = x.detach().movedim(dim, 0)
    most = max(widths)
    own = moved.new_zeros(most, *moved.shape[1:])
    own[: moved.shape[0]] = moved
    unpadded = [part[:n] for part, n in zip(join(own, group), widths, strict=True)]
    return torch.cat(unpadded).movedim(0, dim)


def _scatter(x: Tensor, group: dist.ProcessGroup, widths: list[int], dim: int) -> Tensor:
    if x.is_cpu and shared_buffer_of(group) is not None:
        # In memory that all have, a sum is as fast as a part of it.
        return _own(_sum(x, group), group, widths, dim).clone()
    moved, most = x.detach().movedim(dim, 0), max(widths)
    parts = []
    for part in torch.split(moved, widths):
        # Collectives want tensors of one shape.
        parts.append(moved.new_zeros(most, *moved.shape[1:]))
        parts[-1][: len(part)] = part
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own[: widths[dist.get_rank(group)]].movedim(0, dim)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Any, ...]:
        return _sum(gradient, ctx.group), None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Any, ...]:
        return gradient, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, widths: list[int], dim: int
    ) -> Tensor:
        ctx.dim, ctx.start = dim, sum(widths[: dist.get_rank(group)])
        ctx.width = x.shape[dim]
        return _join(x, group, widths, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient.narrow(ctx.dim, ctx.start, ctx.width), None, None, None


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, widths: list[int], dim: int
    ) -> Tensor:
        ctx.group, ctx.widths, ctx.dim = group, widths, dim
        return _own(x, group, widths, dim).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _join(gradient, ctx.group, ctx.widths, ctx.dim), None, None, None


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, widths: list[int], dim: int
    ) -> Tensor:
        ctx.group, ctx.widths, ctx.dim = group, widths, dim
        return _join(x, group, widths, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _scatter(gradient, ctx.group, ctx.widths, ctx.dim), None, None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, widths: list[int], dim: int
    ) -> Tensor:
        ctx.group, ctx.widths, ctx.dim = group, widths, dim
        return _scatter(x, group, widths, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _join(gradient, ctx.group, ctx.widths, ctx.dim), None, None, None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _exchange(x, group, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _exchange(gradient, ctx.group, ctx.received, ctx.sent), None, None, None
