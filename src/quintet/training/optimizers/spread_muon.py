"""Muon on matrices that lie in several processes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quintet.training.optimizers.layout import Layout
from quintet.training.optimizers.muon import Muon


class SpreadMuon(Muon):
    """Muon where a process has parts of matrices: one is made whole, moved, and cut again.

    An orthogonal matrix is not made of orthogonal parts. Every process moves the whole, one after
    the other, and keeps its own part of weight and momentum; whole experts stay where they are.

    Args:
        params: tables of what each process has, as `Muon` takes them.
        names: of which parameter each is a part.
        layout: where the rest of it is.
        momentum: μ.
        nesterov: whether it looks one gradient ahead.
    """

    def __init__(
        self,
        params: Iterable[Any],
        names: Mapping[Tensor, str],
        layout: Layout,
        *,
        momentum: float,
        nesterov: bool,
    ) -> None:
        super().__init__(params, momentum=momentum, nesterov=nesterov)
        self._names, self._layout = dict(names), layout

    def _alike(self) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
        for group in self.param_groups:
            for p in group["params"]:
                apart = self._layout.apart(self._names[p], p)
                # Nobody waits for who has no expert of a stack.
                if p.grad is not None and (apart or p.numel()):
                    yield [(p, group)]

    def _move(self, alike: list[tuple[Tensor, dict[str, Any]]]) -> None:
        ((p, group),) = alike
        name, layout = self._names[p], self._layout
        if not layout.apart(name, p):
            super()._move(alike)
            return
        assert p.grad is not None
        own = self.state[p].setdefault("momentum", torch.zeros_like(p))
        whole = layout.whole(name, p.detach())
        whole.grad = layout.whole(name, p.grad)
        self.state[whole] = {"momentum": layout.whole(name, own)}
        super()._move([(whole, group)])
        own.copy_(layout.part(name, self.state.pop(whole)["momentum"]))
        p.copy_(layout.part(name, whole))
