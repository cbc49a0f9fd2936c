"""Recorded device graphs, which replay without Python."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# Kernels are compiled, and libraries take their memory, in the first runs.
WARM_UP = 2


class Graphs(Protocol):
    """A way to record what a device does."""

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a function, and return a replay that reads the inputs' present values.

        The function is run some times first. What is returned returns the same tensor at every
        call, which the next call overwrites.

        Raises:
            RuntimeError: the function does what cannot be recorded.
        """
        ...


class CudaGraphs:
    """CUDA graphs of one device, with a shared memory pool.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a function, and return its replay."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile is none of it.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                output = function()

        def replay() -> Tensor:
            # A thread may have another current device.
            with torch.cuda.device(self.device):
                graph.replay()
            return output

        return replay


def graphs_of(device: torch.device) -> Graphs | None:
    """Return a device's way to record, or None."""
    return CudaGraphs(device) if device.type == "cuda" else None
