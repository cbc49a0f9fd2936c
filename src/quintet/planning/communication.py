"""The time of collectives between devices, at best.

An all-reduce among t devices moves 2(t - 1)/t of its bytes through each (a ring, or a
reduce-scatter and an all-gather); what spans nodes does so within each node first, and across
nodes with the part of them that each device then has. An exchange moves (p - 1)/p of them.
"""

from dataclasses import dataclass

from quintet.planning.devices import Device, Link
from quintet.planning.world import World


@dataclass(frozen=True, slots=True)
class Network:
    """The links of a world. Groups are of ranks `stride` apart, `count` of them."""

    world: World
    device: Device

    def all_reduce(self, nbytes: float, count: int) -> float:
        """Return the seconds of summing `nbytes` among ranks beside each other."""
        inside, nodes = self._levels(count)
        seconds = 0.0
        if inside > 1:
            seconds += _ring(nbytes, inside, self.device.link) * 2
        if nodes > 1:
            seconds += _ring(nbytes / inside, nodes, self.device.network) * 2
        return seconds

    def gather(self, nbytes: float, count: int, stride: int = 1) -> float:
        """Return the seconds until each rank has all `nbytes`, or a sum of its part of them."""
        if count == 1:
            return 0.0
        inside, nodes = self._levels(count * stride)
        inside = max(1, inside // stride)
        if nodes == 1:
            return _ring(nbytes, count, self.device.link)
        across = _ring(nbytes / inside, count // inside, self.device.network)
        return across + (_ring(nbytes, inside, self.device.link) if inside > 1 else 0.0)

    def exchange(self, nbytes: float, count: int) -> float:
        """Return the seconds until each rank has sent `nbytes` to all ranks, itself included."""
        if count == 1:
            return 0.0
        link = self._link(count)
        return nbytes * (count - 1) / count / link.bandwidth + link.latency

    def send(self, nbytes: float, distance: int) -> float:
        """Return the seconds until a rank this many ranks further has `nbytes`."""
        link = self._link(distance + 1)
        return nbytes / link.bandwidth + link.latency

    def _levels(self, count: int) -> tuple[int, int]:
        """Return the number of `count` adjacent ranks in a node, and the number of nodes."""
        inside = min(count, self.world.per_node)
        return inside, -(-count // inside)

    def _link(self, span: int) -> Link:
        return self.device.link if span <= self.world.per_node else self.device.network


def _ring(nbytes: float, count: int, link: Link) -> float:
    """Return the seconds of one half of an all-reduce."""
    return nbytes * (count - 1) / count / link.bandwidth + link.latency / 2
