"""Experts on several processes: each runs its own, and what all make adds up.

Processes that have the same tokens need to send none: each runs what of its own experts is asked
for, and the sum that is due behind the block adds up (`OwnExperts`). Where processes have tokens of
their own, each sends them where their experts are, and gets back what these made (`Exchange`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quintet.layers.moe import ExpertStack
from quintet.parallel.regions import exchanged
from quintet.parallel.world import World
from quintet.sharding import Sharding

# Maps rows (M, C) by experts (M, 1) and weights (M, 1).
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def connect_experts(model: nn.Module, sharding: Sharding, world: World) -> None:
    """Let stacks of experts that were cut run what is here, and find the rest elsewhere."""
    if world.degrees.ep == 1:
        return
    for path, module in model.named_modules():
        if not isinstance(module, ExpertStack):
            continue
        seats = sharding.seats.get(path)
        copies = None if seats is None else Copies.of(seats, module.num_experts, world.device)
        count = module.num_experts if seats is None else len(seats)
        here = OwnExperts(module, *world.place.ep, count, copies)
        apart = world.degrees.ep > world.degrees.tp
        forward = Exchange(here, world.groups["ep"], *world.place.tp) if apart else here
        vars(module)["forward"] = forward


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
        copies: where which expert is; None where each is there once, in order.
        inner: what runs the own experts in place of their forward, with what was put on them.
    """

    experts: ExpertStack
    index: int
    count: int
    seats: int
    copies: Copies | None
    inner: Forward | None = None

    def through(self, inner: Forward) -> "OwnExperts":
        """Return the same where something else runs the own experts."""
        return replace(self, inner=inner)

    @property
    def own(self) -> int:
        """How many experts this process has."""
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
        made: Tensor = forward(x, experts[:, None], weights[:, None])
        return made

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Sum what the own experts among `indices` (N, A) make of tokens (N, C), by their weights.

        Zeros where a token has none here: the sum over the processes is the sum over all experts.
        """
        local = self.seated(indices) - self.index * self.own
        tokens, choices = ((local >= 0) & (local < self.own)).nonzero(as_tuple=True)
        made = self.run(x[tokens], local[tokens, choices], weights[tokens, choices])
        out = _zeros(x)
        return out.index_add(0, tokens, made.to(out.dtype)).to(x.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """The forward of a stack of experts to which processes send tokens of their own.

    Processes along tp have the same tokens: each sends its share, and the sum behind the block
    puts them together. How many rows are sent where is the one thing that is waited for.

    Attributes:
        group: the processes that have the experts.
        index: which of the processes with the same tokens this is.
        count: how many of these there are.
    """

    here: OwnExperts
    group: dist.ProcessGroup
    index: int
    count: int

    def through(self, inner: Forward) -> "Exchange":
        """Return the same where something else runs the own experts."""
        return replace(self, here=self.here.through(inner))

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Sum what experts `indices` (N, A) make of tokens (N, C), by their weights.

        Zeros for the tokens that another process along tp sends.
        """
        here = self.here
        start, end = (len(x) * i // self.count for i in (self.index, self.index + 1))
        seats = here.seated(indices)[start:end].flatten()
        order = seats.argsort(stable=True)
        tokens = start + order // indices.shape[1]
        sent = torch.zeros(here.seats, dtype=torch.long, device=x.device)
        sent = sent.scatter_add(0, seats, torch.ones_like(seats)).view(here.count, here.own)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        out_sizes, in_sizes = torch.stack((sent, received)).sum(dim=2).tolist()
        rows = exchanged(x[tokens], self.group, out_sizes, in_sizes)
        # Each process sends its rows expert by expert.
        own = torch.arange(here.own, device=x.device, dtype=torch.long).repeat(here.count)
        own = own.repeat_interleave(received.flatten(), output_size=sum(in_sizes))
        made = here.run(rows, own, weights.new_ones(len(rows)))
        back = exchanged(made, self.group, in_sizes, out_sizes)
        # Weighed and added here, in the order of one process.
        made = back * weights[start:end].flatten()[order, None]
        out = _zeros(x)
        return out.index_add(0, tokens, made.to(out.dtype)).to(x.dtype)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
