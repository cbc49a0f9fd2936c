"""Muon: momentum whose matrices are made orthogonal (arXiv:2502.16982)."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from quintet.training.optimizers.orthogonal import orthogonal, quick_dtype

# How many numbers are made orthogonal at once; more are no quicker, and only take memory.
AT_ONCE = 2**22


class Muon(torch.optim.Optimizer):
    """Move matrices along their momentum made orthogonal, with the size of AdamW's updates.

    With the gradient G: M = μM + (1-μ)G and W = W - ηλW - η·.2√max(m, n)·NS(U) (arXiv:2502.16982
    eq. 4), where U = μM + (1-μ)G looks one gradient ahead, or U = M, and NS(U) ≈ (UUᵀ)^-½ U.

    The last two axes of a parameter are a matrix, or `matrices` of them, one above the other; the
    axes before count them. Matrices of one shape are made orthogonal together.

    A matrix whose gradient is 0 throughout stays as it is, its momentum too. An update has one
    size however small the momentum is, so that an expert nobody chose would go on at full pace.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        matrices: int = 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take parameters, or tables of them with options of their own.

        Args:
            params: tensors of two axes or more, or tables as of all of PyTorch's optimisers.
            lr: η.
            weight_decay: λ.
            momentum: μ.
            nesterov: whether it looks one gradient ahead.
            matrices: how many there are in the last two axes.
            dtype: what they are made orthogonal in; None for bfloat16 where that is quick.
        """
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "matrices": matrices,
        }
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient; return the closure's result, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for alike in self._alike():
            self._move(alike)
        return loss

    def _alike(self) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
        """Yield parameters whose matrices are of one shape, of not too many numbers together."""
        waiting = defaultdict(list)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    rows = p.shape[-2] // group["matrices"]
                    waiting[rows, p.shape[-1], p.device].append((p, group))
        for alike in waiting.values():
            batch: list[tuple[Tensor, dict[str, Any]]] = []
            for p, group in alike:
                if batch and sum(q.numel() for q, _ in batch) + p.numel() > AT_ONCE:
                    yield batch
                    batch = []
                batch.append((p, group))
            yield batch

    def _move(self, alike: list[tuple[Tensor, dict[str, Any]]]) -> None:
        moving = _moving(alike)
        updates = []
        for (p, group), those in zip(alike, moving, strict=True):
            assert p.grad is not None
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            if those is None:
                momentum.lerp_(p.grad, 1 - group["momentum"])
            else:
                momentum.lerp_(p.grad, (1 - group["momentum"]) * those)
            update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            rows = p.shape[-2] // group["matrices"]
            updates.append(update.reshape(-1, rows, p.shape[-1]))
        orthogonal = self._orthogonal(updates)
        for (p, group), those, part in zip(alike, moving, orthogonal, strict=True):
            size = 0.2 * max(part.shape[-2:]) ** 0.5
            part = part.reshape(p.shape)
            decay = group["lr"] * group["weight_decay"]
            if those is None:
                p.mul_(1 - decay)
            else:
                p.mul_(1 - decay * those)
                part = part * those
            p.add_(part, alpha=-group["lr"] * size)

    def _orthogonal(self, updates: list[Tensor]) -> tuple[Tensor, ...]:
        """Return updates of one shape (…, m, n), made orthogonal."""
        x = updates[0] if len(updates) == 1 else torch.cat(updates)
        dtype = self.dtype or quick_dtype(x.device)
        count = max(1, AT_ONCE // (x.shape[-2] * x.shape[-1]))
        parts = [orthogonal(part, dtype=dtype) for part in torch.split(x, count)]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.split(joined, [len(update) for update in updates])


def _moving(alike: list[tuple[Tensor, dict[str, Any]]]) -> list[Tensor | None]:
    """Return a mask of each parameter's rows of matrices with a gradient; None for all."""
    masks = []
    for p, group in alike:
        assert p.grad is not None
        of_matrices = p.grad.reshape(*p.shape[:-2], group["matrices"], -1, p.shape[-1])
        masks.append(torch.linalg.vector_norm(of_matrices, dim=(-2, -1)) != 0)
    whole = torch.stack([mask.all() for mask in masks]).tolist()
    return [
        None if all_move else _by_rows(mask, p)
        for (p, _), mask, all_move in zip(alike, masks, whole, strict=True)
    ]


def _by_rows(mask: Tensor, p: Tensor) -> Tensor:
    """Spread a mask of matrices over their rows, (…, m, 1), in the parameter's dtype."""
    return mask.repeat_interleave(p.shape[-2] // mask.shape[-1], dim=-1)[..., None].to(p.dtype)
