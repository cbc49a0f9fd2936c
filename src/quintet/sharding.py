"""Tensor-parallel tables: how each layer's parameters are cut among processes, as data.

A table says of each parameter which of its dimensions is cut, and into what: heads, groups and
experts stay whole. It says of modules where tensors enter and leave the region in which each
process computes a part (arXiv:1909.08053, §3). It knows of no processes, and computes nothing;
`quintet.parallel` does both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

# tp: parts of matrices. ep: whole experts. etp: parts of the matrices of experts.
Axis = Literal["tp", "ep", "etp"]


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of a dimension: `count` units of `width` numbers; no unit is cut.

    Attributes:
        key: what of the configuration says how many there are; errors name it.
        uneven: whether the last process may have fewer.
        shared: whether several processes may have the same unit, where there are more of them.
        order: which unit is at each place, in place of one after the other; some may be at several.
    """

    count: int
    width: int
    key: str
    uneven: bool = False
    shared: bool = False
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """A dimension cut along an axis of processes, each of its sections separately.

    Where processes share a unit, each computes with it for itself, and its gradients add up.
    """

    dim: int
    sections: tuple[Section, ...]
    axis: Axis = "tp"


# Every process has all of it.
WHOLE: tuple[Cut, ...] = ()


def rows(*sections: Section, axis: Axis = "tp") -> tuple[Cut, ...]:
    """Cut a map by its outputs, (O, I) or (O,)."""
    return (Cut(0, sections, axis),)


def columns(*sections: Section, axis: Axis = "tp") -> tuple[Cut, ...]:
    """Cut a map by its inputs, (O, I); the processes' products are summed."""
    return (Cut(1, sections, axis),)


def stacked(experts: Section, cut: Cut) -> tuple[Cut, ...]:
    """Give processes whole experts of a stack (E, ...), or a share of each expert."""
    return (Cut(0, (experts,), "ep"), cut)


@dataclass(frozen=True, slots=True)
class Sharding:
    """The cut of each parameter and module below a module, by name.

    Identity forward and a sum over processes backward is what the papers call f, the reverse g.

    Attributes:
        parameters: the cuts of each parameter and persistent buffer; () for none.
        copies: modules whose arguments pass f: each process computes a part with all of them.
        copies_output: modules whose output passes f.
        reduces: modules whose output passes g: it is a part of a sum.
        first_only: parameters added after a sum, which therefore only the first process has; those
            of the others are zero.
        vocabulary: modules whose rows are ids: embedding and head.
        partial: parameters that are whole everywhere and used where f was passed before: each
            process has a part of their gradients.
        spread: norms of groups of channels, which several processes may have parts of.
        seats: of a stack of experts, which expert is at each place; those not there are in order.
    """

    parameters: Mapping[str, tuple[Cut, ...]] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    copies_output: tuple[str, ...] = ()
    reduces: tuple[str, ...] = ()
    first_only: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    seats: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def below(self, prefix: str) -> "Sharding":
        """Return the table with a prefix, such as "model.", before each name."""
        return replace(
            self,
            parameters={prefix + name: cuts for name, cuts in self.parameters.items()},
            copies=_below(prefix, self.copies),
            copies_output=_below(prefix, self.copies_output),
            reduces=_below(prefix, self.reduces),
            first_only=_below(prefix, self.first_only),
            vocabulary=_below(prefix, self.vocabulary),
            partial=_below(prefix, self.partial),
            spread=_below(prefix, self.spread),
            seats={prefix + name: order for name, order in self.seats.items()},
        )

    def __or__(self, other: "Sharding") -> "Sharding":
        """Merge two tables; the left one wins."""
        return Sharding(
            {**other.parameters, **self.parameters},
            self.copies + other.copies,
            self.copies_output + other.copies_output,
            self.reduces + other.reduces,
            self.first_only + other.first_only,
            self.vocabulary + other.vocabulary,
            self.partial + other.partial,
            self.spread + other.spread,
            {**other.seats, **self.seats},
        )


@runtime_checkable
class Shardable(Protocol):
    """A module that says how its parameters are cut and where tensors are exchanged."""

    def sharding(self) -> Sharding:
        """Return the table of names below the module; "" is the module itself."""


def _below(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple((prefix + name).removesuffix(".") for name in names)
