"""The machine and its peak rates, measured."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quintet.kernels.bandwidth import read

# Far larger than the caches of a CPU.
_READ_BYTES = 192 * 2**20


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that a result was measured on.

    Attributes:
        cpu: as it names itself.
        cores: those this process may use.
        memory: in bytes, or None if the system hides it.
        system: its name and version.
        python: its version.
        torch: its version.
    """

    cpu: str
    cores: int
    memory: int | None
    system: str
    python: str
    torch: str

    @classmethod
    def here(cls) -> "Machine":
        """Describe this one."""
        memory = None
        if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        cores = os.cpu_count() or 1
        if sys.platform == "linux":
            cores = len(os.sched_getaffinity(0))
        return cls(
            cpu=_cpu_name(),
            cores=cores,
            memory=memory,
            system=platform.platform(terse=True),
            python=platform.python_version(),
            torch=torch.__version__,
        )


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The memory bandwidth in bytes per second, and how it was measured."""

    bytes_per_second: float
    how: str


def read_bandwidth(budget: float = 0.5) -> Bandwidth:
    """Measure for `budget` seconds how fast all threads together read memory."""
    buffer = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device="cpu")
    if read(buffer) is None:
        seconds = _fastest(lambda: buffer.sum(), budget)
        return Bandwidth(buffer.nbytes / seconds, "torch.sum, which understates it")
    return Bandwidth(
        buffer.nbytes / _fastest(lambda: read(buffer), budget), "wide loads with prefetch"
    )


def gemm_peak(dtype: torch.dtype, budget: float = 0.5) -> float:
    """Measure for `budget` seconds the most operations a second of a matrix product."""
    tokens, width = 512, 4096
    x = torch.randn(tokens, width, dtype=torch.float32, device="cpu").to(dtype)
    w = torch.randn(width, width, dtype=torch.float32, device="cpu").to(dtype)
    seconds = _fastest(lambda: torch.nn.functional.linear(x, w), budget)
    return 2 * tokens * width * width / seconds


def peak_memory() -> int:
    """Return the most memory this process held so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MachineLoad:
    """Other load on the machine during a measurement, or None if unknown.

    Used as a context; `others` and `stolen` are shares of all cores' time.
    """

    def __init__(self, own: Callable[[], float] = time.process_time) -> None:
        self._own = own
        self.others: float | None = None
        self.stolen: float | None = None

    def __enter__(self) -> "MachineLoad":
        self._before = _processor_times(), self._own()
        return self

    def __exit__(self, *_: object) -> None:
        before, own = self._before
        after = _processor_times()
        if before is None or after is None:
            return
        total, busy, stolen = (b - a for a, b in zip(before, after, strict=True))
        if total > 0:
            self.others = max(0.0, busy - (self._own() - own)) / total
            self.stolen = stolen / total

    def facts(self) -> dict[str, Any]:
        """Return both shares, with the load average of the last minute."""
        average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return {"others": self.others, "stolen": self.stolen, "load_average": average}


def _processor_times() -> tuple[float, float, float] | None:
    """Return seconds of all cores so far: in total, busy, and taken by the hypervisor."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    user, nice, system, idle, wait, irq, soft, stolen = (float(x) for x in line.split()[1:9])
    busy = user + nice + system + irq + soft
    ticks = os.sysconf("SC_CLK_TCK")
    return (busy + idle + wait + stolen) / ticks, busy / ticks, stolen / ticks


def _fastest(run: Callable[[], object], budget: float) -> float:
    """Return the seconds of the fastest run, of two or more within `budget`."""
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < budget:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
