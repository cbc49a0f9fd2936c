"""Devices in nodes, and the ways to split a model over them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from quintet.errors import InputError, shown
from quintet.sharding import Axis

MOST = 2**16


@dataclass(frozen=True, slots=True)
class World:
    """Nodes with equally many devices each."""

    nodes: int
    per_node: int

    @classmethod
    def parse(cls, text: str) -> "World":
        """Return the world that `2x8`, two nodes of eight, or `8`, eight of one node, describe.

        Raises:
            InputError: it describes none.
        """
        found = re.fullmatch(r"(?:(\d{1,6})\s*[xX×*]\s*)?(\d{1,6})", text.strip(), re.ASCII)
        nodes, per_node = (int(found[1] or 1), int(found[2])) if found else (0, 0)
        if not 0 < nodes * per_node <= MOST:
            raise InputError(
                f"--world {shown(text)} has to be NODESxDEVICES such as 2x8, or the devices of one "
                f"node such as 8; from 1 to {MOST:,} devices"
            )
        return cls(nodes, per_node)

    @property
    def size(self) -> int:
        """All devices."""
        return self.nodes * self.per_node

    def grown(self, factor: int) -> "World":
        """Return a world with this many times the nodes."""
        return World(self.nodes * factor, self.per_node)

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node}"


@dataclass(frozen=True, slots=True)
class Split:
    """A split of model and work over devices; there are tp · fsdp · dp · pp of them.

    Ranks of one tensor-parallel group are beside each other, then those with rows of their own,
    then stages. With `ep` > `tp` attention is data-parallel and experts are not: each group of tp
    has rows of its own, and their tokens are exchanged.

    Attributes:
        tp: devices that share each matrix; of routed experts too, as far as `ep` is less.
        ep: devices that routed experts are shared out to, among those of tp, then of groups.
        pp: stages of layers one after another.
        dp: groups with rows of their own and a copy of what each has.
        fsdp: in training, groups with rows of their own that share parameters, gradients and what
            the optimiser keeps.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    dp: int = 1
    fsdp: int = 1

    @property
    def size(self) -> int:
        """All devices."""
        return self.tp * self.groups * self.pp

    @property
    def groups(self) -> int:
        """The number of groups that have rows of their own."""
        return self.dp * self.fsdp

    @property
    def expert_tp(self) -> int:
        """The devices that share each matrix of an expert."""
        return max(self.tp // self.ep, 1)

    @property
    def counts(self) -> Mapping[Axis, int]:
        """The number of devices along each axis of a table of cuts."""
        return {"tp": self.tp, "ep": self.ep, "etp": self.expert_tp}

    @property
    def exchanges(self) -> bool:
        """Whether tokens are sent to other groups' experts."""
        return self.ep > self.tp

    @property
    def expert_fsdp(self) -> int:
        """The devices that share the parameters of the same experts in training."""
        return max(1, self.fsdp * self.tp // max(self.ep, self.tp))

    @property
    def fault(self) -> str | None:
        """The fault of the split in words, or None."""
        if self.ep % self.tp and self.tp % self.ep:
            return f"ep={self.ep} and tp={self.tp}: one has to divide the other"
        # What FSDP has in slices is not in copies, and experts are on one axis of the two.
        across = self.fsdp if self.fsdp > 1 else self.dp
        if (self.tp * across) % self.ep:
            return f"ep={self.ep} has to divide the {self.tp * across} devices that share experts"
        return None

    def __str__(self) -> str:
        named = {"tp": self.tp, "ep": self.ep, "pp": self.pp, "dp": self.dp, "fsdp": self.fsdp}
        text = ", ".join(f"{name} {count}" for name, count in named.items() if count > 1)
        return text or "none: one device has it all"


@dataclass(frozen=True, slots=True)
class SplitLimits:
    """The splits to consider.

    Attributes:
        fixed: numbers that a split has to have, by its attributes' names.
        most: the largest numbers that it may have.
    """

    fixed: tuple[tuple[str, int], ...] = ()
    most: tuple[tuple[str, int], ...] = ()

    def allow(self, split: Split) -> bool:
        """Return whether a split is one of those."""
        numbers = {"tp": split.tp, "ep": split.ep, "pp": split.pp, "dp": split.dp}
        numbers["fsdp"] = split.fsdp
        return all(numbers[name] == count for name, count in self.fixed) and all(
            numbers[name] <= count for name, count in self.most
        )


def splits(world: World, limits: SplitLimits, *, experts: bool, train: bool) -> Iterator[Split]:
    """Yield all splits over a whole world, those of one device's experts first.

    Args:
        world: all of whose devices are used.
        limits: what a split may be.
        experts: whether there are routed experts.
        train: whether parameters may be shared among groups.
    """
    for tp in _divisors(world.size):
        # A group of tensor parallelism fills nodes, or lies within one.
        if max(tp, world.per_node) % min(tp, world.per_node):
            continue
        for pp in _divisors(world.size // tp):
            groups = world.size // tp // pp
            for fsdp in _divisors(groups) if train else (1,):
                for ep in _divisors(tp * groups) if experts else (1,):
                    split = Split(tp, ep, pp, groups // fsdp, fsdp)
                    if split.fault is None and limits.allow(split):
                        yield split


@lru_cache(maxsize=256)
def _divisors(number: int) -> Sequence[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
