"""Expert loads, and the router biases that balance them without a loss."""

import math
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from quintet.configuration.numbers import is_finite
from quintet.errors import InputError, shown
from quintet.layers.router import ExpertRouter
from quintet.layers.routing import SigmoidRouter
from quintet.modeling.core import ModelCore
from quintet.ops.routing import balanced_bias, expert_load, max_violation


class ExpertLoads:
    """Counts the tokens that each router sends to each expert.

    Padding passes no router and is not counted. A layer that is recomputed in the backward pass,
    in whatever way, is counted once. `close`, or leaving it as a context, ends the counting.

    Args:
        model: whose routers, those of prediction layers among them.
        training: count what passes routers in training mode alone, and not under
            `torch.inference_mode`, so that evaluations between steps do not matter.

    Attributes:
        routers: L of them, by their names.

    Raises:
        InputError: the model has no experts.
    """

    def __init__(self, model: nn.Module, *, training: bool = False) -> None:
        self.routers = {n: m for n, m in model.named_modules() if isinstance(m, ExpertRouter)}
        if not self.routers:
            raise InputError(
                f"{type(model).__name__} has no experts to count the tokens of; DeepSeek-V2, "
                "DeepSeek-V3 and Qwen2-MoE have them"
            )
        self.training = training
        self._sequences = model.sequences if isinstance(model, ModelCore) else None
        self._counts: dict[str, Tensor] = {}
        self._handles = [
            router.register_forward_hook(partial(self._count, name))
            for name, router in self.routers.items()
        ]

    def loads(self) -> Tensor:
        """Return the tokens each router sent to each expert since `clear`, (L, E).

        They are sums: those of several processes add up, and `BiasBalancer.step` takes them.
        """
        # Of layers in another process there is no weight.
        weights = (x for router in self.routers.values() for x in router.parameters(recurse=False))
        weight = next(weights, None)
        device = torch.device("cpu") if weight is None else weight.device
        rows = []
        for name, router in self.routers.items():
            none = torch.zeros(router.num_experts, dtype=torch.long, device="cpu")
            rows.append(self._counts.get(name, none).to(device))
        return torch.stack(rows)

    def violations(self, loads: Tensor | None = None) -> dict[str, float]:
        """Return MaxVio, max load / mean load - 1, of each router that was used.

        Of loads (L, E) such as the sums of several processes, in place of those counted here.
        """
        return {name: max_violation(load) for name, load in self._seen(loads)}

    def metrics(self) -> dict[str, float]:
        """Return numbers for a log; see `balance_metrics`."""
        return balance_metrics([load for _, load in self._seen()])

    def clear(self) -> None:
        """Reset the counts."""
        self._counts.clear()

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

    def _seen(self, loads: Tensor | None = None) -> list[tuple[str, Tensor]]:
        counted = self.loads() if loads is None else loads
        named = zip(self.routers, counted.cpu(), strict=True)
        return [(name, load) for name, load in named if bool(load.any())]

    @torch.no_grad()
    def _count(
        self,
        name: str,
        router: ExpertRouter,
        args: tuple[object, ...],
        out: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        if self.training and (not router.training or torch.is_inference_mode_enabled()):
            return
        # Inside a backward pass runs nothing but what recomputes.
        if torch._C._current_graph_task_id() != -1:
            return
        chosen = out[2]
        if self._sequences is not None and (real := self._sequences.real) is not None:
            chosen = chosen[real]
        load = expert_load(chosen, router.num_experts)
        total = self._counts.get(name)
        self._counts[name] = load if total is None else total + load


class BiasBalancer(ExpertLoads):
    """Balances experts by moving the biases of DeepSeek-V3's routers.

    Call `step` after each step of the optimiser: b_e += γ · sign(mean load - load_e)
    (arXiv:2412.19437, §2.1.2), the loads being those of all forwards in training mode since the
    last. A router whose weight is frozen, as beneath adapters, is counted, and its bias stays: it
    belongs to a model that is not trained.

    Args:
        model: whose routers.
        rate: γ, how far a bias moves in a step, where `step` is not told another.
        centred: subtract from what is added to the biases of a router its mean.

    Raises:
        InputError: the model has no router with a bias, all of them are frozen, or the rate is
            no number of at least 0.
    """

    def __init__(self, model: nn.Module, rate: float = 0.001, *, centred: bool = False) -> None:
        _check_rate(rate)
        found = [m for m in model.modules() if isinstance(m, SigmoidRouter)]
        if not found:
            raise InputError(
                f"{type(model).__name__} has no router with a bias; only DeepSeek-V3's have one"
            )
        if found := [router for router in found if _is_local(router)]:
            self._check_learns(model, found)
        super().__init__(model, training=True)
        self.rate = rate
        self.centred = centred

    @staticmethod
    def _check_learns(model: nn.Module, routers: Sequence[SigmoidRouter]) -> None:
        if not any(router.weight.requires_grad for router in routers):
            raise InputError(
                f"all routers of this {type(model).__name__} are frozen, as beneath adapters, and "
                "their biases belong to them; train the routers, or leave balancing out"
            )

    @torch.no_grad()
    def step(self, rate: float | None = None, loads: Tensor | None = None) -> None:
        """Move the biases and forget the loads.

        Args:
            rate: γ of this step.
            loads: (L, E) to move them against, such as the sums of several processes; those
                counted here if not given.

        Raises:
            InputError: the loads have another shape, or the rate is no number of at least 0.
        """
        rate = self.rate if rate is None else rate
        _check_rate(rate)
        counted = self.loads()
        if loads is not None and loads.shape != counted.shape:
            raise InputError(
                f"loads have shape {tuple(loads.shape)}; there are {counted.shape[0]} routers of "
                f"{counted.shape[1]} experts, as in loads()"
            )
        counted = counted if loads is None else loads
        for router, load in zip(self.routers.values(), counted, strict=True):
            if not _is_local(router):
                continue
            if isinstance(router, SigmoidRouter) and router.weight.requires_grad:
                bias = router.e_score_correction_bias
                moved = balanced_bias(bias, load.to(bias.device), rate, centred=self.centred)
                bias.copy_(moved)
        self.clear()


LoadBalancer = BiasBalancer


def _is_local(router: nn.Module) -> bool:
    """Return whether a router is in this process, if others hold other layers."""
    return any(True for _ in router.parameters(recurse=False))


def balance_metrics(loads: list[Tensor]) -> dict[str, float]:
    """Summarise the loads (E,) of several layers as numbers for a log.

    max_violation is the mean over layers of max load / mean load - 1, worst_violation the largest;
    load_entropy the mean entropy of the shares of the load over that of equal ones, 1 in perfect
    balance; dead_experts how many got nothing, of all layers. Without loads there are no numbers.
    """
    if not loads:
        return {}
    violations = [max_violation(load) for load in loads]
    entropies = []
    for load in loads:
        share = load.to(torch.float64) / load.sum()
        entropies.append(float(-torch.xlogy(share, share).sum()) / math.log(max(len(load), 2)))
    return {
        "max_violation": sum(violations) / len(violations),
        "worst_violation": max(violations),
        "load_entropy": sum(entropies) / len(entropies),
        "dead_experts": float(sum(int((load == 0).sum()) for load in loads)),
    }


def _check_rate(rate: float) -> None:
    if not (is_finite(rate) and rate >= 0):
        raise InputError(f"rate={shown(rate)} is how far a bias moves in a step; it is at least 0")
