"""Experts on several processes: each runs its own, and the results are summed.

Processes that have the same tokens need to send none: each runs what of its own experts is asked
for, and the sum that is due behind the block adds up (`OwnExperts`). Where processes have tokens of
their own, each sends them where their experts are, and gets back what these made (`Exchange`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from quintet.layers.moe import ExpertStack
from quintet.parallel.lockstep import Lockstep
from quintet.parallel.world import World
from quintet.sharding import Sharding

# Maps rows (M, C) by experts (M, 1) and weights (M, 1).
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def connect_experts(model: nn.Module, sharding: Sharding, world: World) -> None:
    """Let cut stacks of experts run their own, and exchange tokens for the rest."""
    if world.degrees.ep == 1:
        return
    apart = world.degrees.ep > world.degrees.tp
    lockstep = Lockstep(world.groups["ep"], world.device) if apart else None
    for path, module in model.named_modules():
        if not isinstance(module, ExpertStack):
            continue
        seats = sharding.seats.get(path)
        copies = None if seats is None else Copies.of(seats, module.num_experts, world.device)
        count = module.num_experts if seats is None else len(seats)
        own_experts = OwnExperts(module, *world.place.ep, count, copies)
        vars(module)["forward"] = own_experts
        if lockstep is not None:
            number = len(lockstep.blocks) + 1
            vars(module)["forward"] = Exchange(own_experts, lockstep, number, *world.place.tp)
            lockstep.blocks.append(own_experts)


def lockstep_of(model: object) -> Lockstep | None:
    """Return the lockstep of a model's processes; None if they have the same texts."""
    if not isinstance(model, nn.Module):
        return None
    exchanges = (vars(module).get("forward") for module in model.modules())
    return next((one.lockstep for one in exchanges if isinstance(one, Exchange)), None)


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Experts of which some are there more than once: tokens take one copy after the other.

    Attributes:
        seats: (E, most) at which seats an expert is, the rest of a row filled with its first.
        numbers: (E,) how many these are.
    """

    seats: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, experts: Sequence[int], count: int, device: torch.device) -> "Copies":
        """Note where each of `count` experts is, given which one is at each seat."""
        found: list[list[int]] = [[] for _ in range(count)]
        for seat, expert in enumerate(experts):
            found[expert].append(seat)
        most = max(map(len, found))
        filled = [own + own[:1] * (most - len(own)) for own in found]
        return cls(
            torch.tensor(filled, device=device, dtype=torch.long),
            torch.tensor([len(own) for own in found], device=device, dtype=torch.long),
        )

    def taken(self, indices: Tensor) -> Tensor:
        """Return the seats (N, A) for experts (N, A): the same in every process."""
        turns = torch.arange(len(indices), device=indices.device, dtype=torch.long)[:, None]
        chosen: Tensor = self.seats[indices, turns % self.numbers[indices]]
        return chosen


@dataclass(frozen=True, slots=True, eq=False)
class OwnExperts:
    """The forward of a stack of experts of which this process has some.

    Attributes:
        index: which process this is.
        count: among how many processes the experts are.
        seats: how many experts there are in all, one that is there twice counted twice.
        copies: where which expert is; None if each is there once, in order.
        inner: what runs the own experts in place of their forward, with what was put on them.
    """

    experts: ExpertStack
    index: int
    count: int
    seats: int
    copies: Copies | None
    inner: Forward | None = None

    def through(self, inner: Forward) -> "OwnExperts":
        """Return a copy in which `inner` runs the own experts."""
        return replace(self, inner=inner)

    @property
    def own(self) -> int:
        """The number of this process's experts."""
        return self.seats // self.count

    def seated(self, indices: Tensor) -> Tensor:
        """Return the seats (N, A) of experts (N, A)."""
        return indices if self.copies is None else self.copies.taken(indices)

    def run(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Map rows (M, C) by the own expert (M,) of each, times a weight (M,)."""
        # With gradients also where there are no rows: experts that learn are part of what these
        # pass, and backward no process may be missing.
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.experts.parameters())
        if len(x) == 0 and not learns:
            return x
        forward = self.inner or partial(type(self.experts).forward, self.experts)
        output: Tensor = forward(x, experts[:, None], weights[:, None])
        return output

    def run_sent(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Map the rows (M, C) that processes sent, `counts` (P, own) of them, by their experts."""
        # Each process sends its rows expert by expert.
        own = torch.arange(self.own, device=rows.device, dtype=torch.long).repeat(self.count)
        own = own.repeat_interleave(counts.flatten(), output_size=len(rows))
        return self.run(rows, own, rows.new_ones(len(rows)))

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Sum the own experts' outputs for tokens (N, C), by `indices` (N, A) and their weights.

        Zeros where a token has none here: the sum over the processes is the sum over all experts.
        """
        local = self.seated(indices) - self.index * self.own
        tokens, choices = ((local >= 0) & (local < self.own)).nonzero(as_tuple=True)
        outputs = self.run(x[tokens], local[tokens, choices], weights[tokens, choices])
        out = _zeros(x)
        return out.index_add(0, tokens, outputs.to(out.dtype)).to(x.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """The forward of a stack of experts to which processes send tokens of their own.

    Processes along tp have the same tokens: each sends its share, and the sum behind the block
    puts them together. How many rows are sent where is the one thing that is waited for.

    Attributes:
        lockstep: the processes that have the experts.
        number: which of the model's blocks this is.
        index: which of the processes with the same tokens this is.
        count: how many of these there are.
    """

    own_experts: OwnExperts
    lockstep: Lockstep
    number: int
    index: int
    count: int

    def through(self, inner: Forward) -> "Exchange":
        """Return a copy in which `inner` runs the own experts."""
        return replace(self, own_experts=self.own_experts.through(inner))

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Sum the outputs of experts `indices` (N, A) for tokens (N, C), by their weights.

        Zeros for the tokens that another process along tp sends.
        """
        own_experts = self.own_experts
        start, end = (len(x) * i // self.count for i in (self.index, self.index + 1))
        seats = own_experts.seated(indices)[start:end].flatten()
        order = seats.argsort(stable=True)
        tokens = start + order // indices.shape[1]
        counts = torch.zeros(own_experts.seats, dtype=torch.long, device=x.device)
        counts = counts.scatter_add(0, seats, torch.ones_like(seats)).view(
            own_experts.count, own_experts.own
        )
        meeting = self.lockstep.at(self.number, counts, x)
        back = self.lockstep.pass_on(meeting, x[tokens], own_experts)
        # Weighed and added here, in the order of one process.
        outputs = back * weights[start:end].flatten()[order, None]
        out = _zeros(x)
        return out.index_add(0, tokens, outputs.to(out.dtype)).to(x.dtype)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
