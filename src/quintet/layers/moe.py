"""The experts of a layer, stacked."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from quintet.kernels.matrix import Matrix
from quintet.layers.context import Notes
from quintet.layers.plain import PlainModule, hooked
from quintet.layers.router import ExpertRouter
from quintet.layers.stack import FusedPart
from quintet.ops.activations import Activation, activation
from quintet.ops.moe import apply_experts
from quintet.sharding import Cut, Section, Sharding, stacked


class ExpertStack(PlainModule, ABC):
    """E gated MLPs in stacked parameters; each storage format is a subclass."""

    num_experts: int
    act_fn: Activation

    @abstractmethod
    def map(self, name: str, expert: int, x: Tensor) -> Tensor:
        """Apply one expert's matrix of the stack `name`, gate_up_proj or down_proj, to (n, I)."""

    @abstractmethod
    def stacks(self) -> tuple[Matrix, Matrix, Matrix] | None:
        """Return gate and up (E, F, C) and down (E, C, F) for kernels, or None."""


class Experts(ExpertStack):
    """E gated MLPs in two parameters: gate_up_proj (E, 2F, C) and down_proj (E, C, F)."""

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, act: str | Activation
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.act_fn = activation(act)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Map tokens (N, C) through experts `indices` (N, A), summed with `weights` (N, A)."""
        return apply_experts(x, indices, weights, self.gate_up_proj, self.down_proj, self.act_fn)

    def sharding(self) -> Sharding:
        """Split experts, or the inner channels of each, over processes."""
        E, _, F = self.down_proj.shape
        experts, inner = Section(E, 1, "num_experts"), Section(F, 1, "moe_intermediate_size")
        return Sharding(
            {
                "gate_up_proj": stacked(experts, Cut(1, (inner, inner), "etp")),
                "down_proj": stacked(experts, Cut(2, (inner,), "etp")),
            }
        )

    def map(self, name: str, expert: int, x: Tensor) -> Tensor:
        stack = self._parameters[name]
        assert stack is not None
        return F.linear(x, stack[expert])

    def stacks(self) -> tuple[Matrix, Matrix, Matrix]:
        """Return views of the parameters."""
        gate, up = self.gate_up_proj.chunk(2, dim=1)
        return Matrix(gate), Matrix(up), Matrix(self.down_proj)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        E, C, F = self.down_proj.shape
        return f"{E} of {C} -> {F} -> {C}"


class ExpertBlock(FusedPart):
    """Base of blocks with a router and experts."""

    gate: nn.Module

    def route(self, x: Tensor, notes: Notes | None) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens (N, C); when a layer is recomputed, repeat the first run's choice."""
        choices = None if notes is None else notes.choices
        # What somebody put in its place need not know of choices.
        replays = choices is not None and isinstance(self.gate, ExpertRouter)
        output: tuple[Tensor, Tensor, Tensor] = self.gate(x, choices) if replays else self.gate(x)
        return output


def run_mlp(mlp: nn.Module, x: Tensor, notes: Notes, *, routed: bool) -> Tensor:
    """Apply an MLP, or an expert block that notes its router logits, to x."""
    # What somebody put in their place need not know of notes that nobody asked for.
    replays = notes.choices is not None and isinstance(mlp, ExpertBlock)
    noted = routed and (notes.router_logits is not None or replays)
    output: Tensor = mlp(x, notes=notes) if noted else mlp(x)
    return output


def silu_stacks(experts: nn.Module) -> tuple[Matrix, Matrix, Matrix] | None:
    """Return gate, up and down of SiLU experts, or None if they must be called."""
    # A subclass with another forward has to bring other stacks.
    if not isinstance(experts, ExpertStack) or "stacks" not in vars(type(experts)):
        return None
    return experts.stacks() if experts.act_fn is F.silu and not hooked(experts) else None
