"""Balancing experts in training by the bias of their routers, without a loss."""

from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from quintet.errors import InputError
from quintet.layers.routing import SigmoidRouter
from quintet.ops.routing import balanced_bias, expert_load, max_violation

__all__ = ["LoadBalancer"]


class LoadBalancer:
    """Counts the tokens of each expert, and moves the routers' biases against their loads.

    Call `step` after each step of the optimiser: b_e += rate · sign(mean load - load_e)
    (DeepSeek-V3, arXiv:2412.19437, §2.1.2). Every token that a router sees counts, padding too.
    `close`, or leaving it as a context, ends the counting.

    Attributes:
        loads: how many tokens each router, by its name, has sent to each expert (E,) since the
            last step.

    Raises:
        InputError: the model has no router with a bias, or the rate is negative.
    """

    def __init__(self, model: nn.Module, rate: float = 0.001) -> None:
        if rate < 0:
            raise InputError(f"rate={rate} is how far a bias moves in a step; it is at least 0")
        self.rate = rate
        self.routers = {n: m for n, m in model.named_modules() if isinstance(m, SigmoidRouter)}
        if not self.routers:
            raise InputError(
                f"{type(model).__name__} has no router with a bias; only DeepSeek-V3's have one"
            )
        self.loads: dict[str, Tensor] = {}
        self._handles = [
            router.register_forward_hook(partial(self._count, name))
            for name, router in self.routers.items()
        ]

    def violations(self) -> dict[str, float]:
        """Return each router's MaxVio since the last step, max load / mean load - 1."""
        return {name: max_violation(load) for name, load in self.loads.items()}

    def step(self) -> None:
        """Move the biases and forget the loads."""
        for name, load in self.loads.items():
            bias = self.routers[name].e_score_correction_bias
            bias.copy_(balanced_bias(bias, load.to(bias.device), self.rate))
        self.loads.clear()

    def close(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @torch.no_grad()
    def _count(
        self, name: str, router: nn.Module, args: tuple[Tensor], out: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        logits, _, indices = out
        load = expert_load(indices, logits.shape[-1])
        held = self.loads.get(name)
        self.loads[name] = load if held is None else held + load
