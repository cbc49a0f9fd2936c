"""Routed beside shared experts, with the routers of DeepSeek-V2 and V3."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from quintet.kernels import parts
from quintet.kernels.routing import Rules
from quintet.layers.context import Notes
from quintet.layers.mlp import GatedMLP, silu_matrices
from quintet.layers.moe import ExpertBlock, Experts, silu_stacks
from quintet.layers.plain import untouched
from quintet.layers.router import ExpertRouter
from quintet.ops.routing import (
    RoutingRules,
    router_logits,
    sigmoid_choice,
    sigmoid_routing,
    sigmoid_rules,
    sigmoid_weights,
    softmax_choice,
    softmax_routing,
    softmax_rules,
    softmax_weights,
)
from quintet.sharding import Sharding


class Router(ExpertRouter):
    """Base of DeepSeek's routers."""

    def __init__(self, hidden_size: int, num_experts: int, rules: RoutingRules) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.rules = rules

    @property
    def active(self) -> int:
        return self.rules.active

    def score(self, x: Tensor) -> Tensor:
        return router_logits(x, self.weight)

    @abstractmethod
    def kernel_rules(self) -> tuple[Rules, Tensor | None]:
        """Return the settings of `choose` for the kernel, and the bias (E,) it adds."""


class SoftmaxRouter(Router):
    """The router of DeepSeek-V2."""

    def affinities(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def choice(self, scores: Tensor) -> Tensor:
        return softmax_choice(scores, self.rules)

    def weigh(self, scores: Tensor, indices: Tensor) -> Tensor:
        return softmax_weights(scores, indices, self.rules)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_routing(logits, self.rules)

    def kernel_rules(self) -> tuple[Rules, None]:
        """Return the settings of `choose` for the kernel."""
        return softmax_rules(self.rules), None


class SigmoidRouter(Router):
    """The router of DeepSeek-V3, with a bias that balances load."""

    e_score_correction_bias: Tensor

    def __init__(self, hidden_size: int, num_experts: int, rules: RoutingRules) -> None:
        super().__init__(hidden_size, num_experts, rules)
        name = "e_score_correction_bias"
        self.register_buffer(name, torch.zeros(num_experts, dtype=torch.float32))

    def affinities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def choice(self, scores: Tensor) -> Tensor:
        return sigmoid_choice(scores, self.e_score_correction_bias, self.rules)

    def weigh(self, scores: Tensor, indices: Tensor) -> Tensor:
        return sigmoid_weights(scores, indices, self.rules)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return sigmoid_routing(logits, self.e_score_correction_bias, self.rules)

    def kernel_rules(self) -> tuple[Rules, Tensor]:
        """Return the settings of `choose` for the kernel, and the load-balancing bias (E,)."""
        return sigmoid_rules(self.rules), self.e_score_correction_bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) must not round the bias: its steps are smaller than bfloat16's.
        bias = self._buffers["e_score_correction_bias"]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is None:
            # Another process has it.
            return self
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self


class SharedExpertsMoE(ExpertBlock):
    """Routed experts, plus shared experts for every token (arXiv:2401.06066, §3)."""

    def __init__(self, gate: Router, experts: Experts, shared_experts: GatedMLP | None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, hidden_states: Tensor, notes: Notes | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C), and note the router's logits (B, T, E)."""
        B, T, _ = hidden_states.shape
        tokens = hidden_states.flatten(0, 1)
        logits, weights, indices = self.route(tokens, notes)
        out: Tensor = self.experts(tokens, indices, weights).view_as(hidden_states)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden_states)
        if notes is not None:
            notes.note_routing(logits.view(B, T, -1))
        return out

    def sharding(self) -> Sharding:
        """Sum the output of routed and shared experts once."""
        if self.shared_experts is None:
            return Sharding(copies=("experts",), reduces=("",))
        shared = self.shared_experts.sharding("n_shared_experts · moe_intermediate_size")
        block = Sharding(copies=("experts", "shared_experts"), reduces=("",))
        return block | shared.below("shared_experts.")

    def part(self, norm: parts.Norm) -> parts.Part | None:
        """Describe router, routed and shared experts to the fused CPU step."""
        router = untouched(self.gate, SoftmaxRouter) or untouched(self.gate, SigmoidRouter)
        experts = silu_stacks(self.experts)
        shared = None if self.shared_experts is None else silu_matrices(self.shared_experts)
        if router is None or experts is None or (shared is None) != (self.shared_experts is None):
            return None
        rules, bias = router.kernel_rules()
        return parts.Routed(norm, router.weight, True, rules, bias, experts, shared)
