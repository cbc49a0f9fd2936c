"""Assigns experts to processes by measured loads.

There are more seats than experts: those that are asked for most stand at several, and tokens take
one after the other (DeepSeek-V3, arXiv:2412.19437, §3.4). Which process has which seats follows by
loads alone; a model whose experts stand so computes what it computes otherwise.
"""

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush

from torch import Tensor

from quintet.errors import InputError


def balanced(
    loads: Mapping[str, Tensor | Sequence[float]],
    processes: int,
    *,
    redundant: int = 0,
    groups: int = 1,
    nodes: int = 1,
) -> dict[str, tuple[int, ...]]:
    """Return for each stack of experts which one stands at each seat; see `seat_experts`.

    Args:
        loads: (E,) how often each expert was asked for, by the names of routers ("….gate") as in
            `quintet.training.balance.ExpertLoads.routers`, or of the stacks ("….experts").
    """
    found = {}
    for name, load in loads.items():
        path = f"{name.removesuffix('.gate')}.experts" if name.endswith(".gate") else name
        numbers = load.tolist() if isinstance(load, Tensor) else list(load)
        found[path] = seat_experts(
            numbers, processes, redundant=redundant, groups=groups, nodes=nodes
        )
    return found


def seat_experts(
    loads: Sequence[float], processes: int, *, redundant: int = 0, groups: int = 1, nodes: int = 1
) -> tuple[int, ...]:
    """Return the expert, of E, at each of E + `redundant` seats, process by process.

    Where nodes divide the groups among which a router chooses, a group stays on one node, as a
    token that is sent to few groups is then sent to few nodes; otherwise all experts are seated at
    once.

    Args:
        loads: (E,) how often each expert was asked for.
        processes: among how many processes the seats are, equally many each.
        redundant: how many seats there are beyond one for each expert.
        groups: how many groups of neighbouring experts the router chooses among.
        nodes: on how many machines the processes are, equally many on each.

    Raises:
        InputError: numbers do not divide each other as they have to.
    """
    count, seats = len(loads), len(loads) + redundant
    if processes < 1 or redundant < 0 or seats % processes:
        raise InputError(
            f"{count} experts and redundant={redundant} are {seats} seats, which "
            f"{processes} processes cannot have equally many of"
        )
    if seats // processes > count:
        raise InputError(
            f"redundant={redundant} gives each of {processes} processes {seats // processes} "
            f"seats, and there are {count} experts; a process needs none twice"
        )
    if nodes < 1 or processes % nodes or groups < 1 or count % groups:
        raise InputError(
            f"nodes={nodes} has to divide the {processes} processes, and "
            f"groups={groups} the {count} experts"
        )
    by_node = [list(range(count))]
    if nodes > 1 and groups % nodes == 0 and seats % nodes == 0:
        size = count // groups
        of_groups = [sum(loads[g * size : (g + 1) * size]) for g in range(groups)]
        by_node = [
            [e for g in sorted(own) for e in range(g * size, (g + 1) * size)]
            for own in _packed(of_groups, nodes)
        ]
    parts = len(by_node)
    order: list[int] = []
    for experts in by_node:
        own = [float(loads[e]) for e in experts]
        order += [experts[i] for i in _seated(own, seats // parts, processes // parts)]
    return tuple(order)


def unevenness(loads: Sequence[float], order: Sequence[int], processes: int) -> float:
    """Return the most that a process has to do over the mean, minus one."""
    copies = [order.count(expert) for expert in range(len(loads))]
    size = len(order) // processes
    done = [
        sum(loads[e] / copies[e] for e in order[start : start + size])
        for start in range(0, len(order), size)
    ]
    mean = sum(done) / processes
    return max(done) / mean - 1 if mean else 0.0


def _seated(loads: Sequence[float], seats: int, processes: int) -> list[int]:
    """Give experts seats, the fullest one more as long as there are some; then pack them."""
    copies = [1] * len(loads)
    # Not more than there are processes: two on one would be of no use.
    fullest = [(-load, expert) for expert, load in enumerate(loads)]
    heapify(fullest)
    for _ in range(seats - len(loads)):
        _, expert = heappop(fullest)
        copies[expert] += 1
        if copies[expert] < processes:
            heappush(fullest, (-loads[expert] / copies[expert], expert))
    experts = [e for e, n in enumerate(copies) for _ in range(n)]
    bins = _packed([loads[e] / copies[e] for e in experts], processes, experts)
    return [experts[i] for own in bins for i in sorted(own)]


def _packed(
    loads: Sequence[float], bins: int, kinds: Sequence[int] | None = None
) -> list[list[int]]:
    """Pack equally many things into each bin, the heaviest first, into the lightest with room.

    No bin gets two of a kind: things of a kind come one after the other, and where only bins that
    have it have room, one of them gives something else away.
    """
    room = len(loads) // bins
    kind_of = range(len(loads)) if kinds is None else kinds
    found: list[list[int]] = [[] for _ in range(bins)]
    weight = [0.0] * bins
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], kind_of[i])):

        def has(b: int, kind: int = kind_of[item]) -> bool:
            return any(kind_of[other] == kind for other in found[b])

        free = [b for b in range(bins) if len(found[b]) < room]
        good = [b for b in free if not has(b)]
        if good:
            best = min(good, key=lambda b: (weight[b], b))
        else:
            # One that is full and has none of this kind gives the lightest that a free one lacks.
            full = [b for b in range(bins) if b not in free and not has(b)]
            target = free[0]
            present = {kind_of[other] for other in found[target]}
            offers = [
                (b, other) for b in full for other in found[b] if kind_of[other] not in present
            ]
            best, given = min(offers, key=lambda offer: loads[offer[1]])
            found[best].remove(given)
            found[target].append(given)
            weight[best] -= loads[given]
            weight[target] += loads[given]
        found[best].append(item)
        weight[best] += loads[item]
    return found
