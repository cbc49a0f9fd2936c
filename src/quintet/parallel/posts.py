"""Messages from one process to all others of a group, which it does not wait for them to read."""

from collections import deque
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

# Of messages that were sent and may not be read yet.
UNDERWAY = 256


@dataclass(slots=True, eq=False)
class Posts:
    """Messages from the first process of a group to the others, in order.

    Attributes:
        group: the processes, which talk through the CPU.
    """

    group: dist.ProcessGroup
    _underway: deque[tuple[dist.Work, Tensor]] = field(default_factory=deque, repr=False)

    def pass_on(self, x: Tensor) -> None:
        """Send x to all processes from the first, which must not change it any more."""
        if dist.get_rank(self.group):
            dist.recv(x, group=self.group, group_src=0)
            return
        for other in range(1, dist.get_world_size(self.group)):
            work = dist.isend(x, group=self.group, group_dst=other)
            assert work is not None
            self._underway.append((work, x))
        while self._underway and (
            len(self._underway) > UNDERWAY or self._underway[0][0].is_completed()
        ):
            self._underway.popleft()[0].wait()

    def wait_all(self) -> None:
        """Wait until the others have read all."""
        while self._underway:
            self._underway.popleft()[0].wait()
