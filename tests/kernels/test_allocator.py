"""In processes of their own: what the C library was told holds for the whole process."""

import os
import platform

import pytest

from forking import Forks
from quintet.kernels.allocator import MMAP_THRESHOLD, TRIM_THRESHOLD, keep

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it is glibc that is told what to keep"
)

FAULTS = """
import resource
import torch
from quintet.kernels.report import report

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(40 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = report().keeps_memory
faults(), faults()
print(kept, faults())
"""


def run(forks: Forks, **variables: str) -> tuple[bool, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    made = forks.run(FAULTS, environment={**clean, **variables})
    assert made.returncode == 0, made.stderr
    kept, faults = made.stdout.split()
    return kept == "True", int(faults)


def test_large_buffers_are_not_cleared_again_by_the_system(forks: Forks) -> None:
    kept, faults = run(forks)
    if not kept:
        pytest.skip("there are no kernels here")
    # Without kernels, below, it is.
    assert faults < 1000


@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
        {"QUINTET_KERNELS": "0"},
    ],
    ids=str,
)
def test_it_gives_way_to_what_somebody_set(variables: dict[str, str], forks: Forks) -> None:
    kept, faults = run(forks, **variables)
    assert not kept
    assert faults > 40_000


@pytest.mark.parametrize(("most", "kept"), [(2**62, True), (32 * 2**20, True), (2**20, False)])
def test_a_c_library_that_takes_less_is_told_less_or_nothing(most: int, kept: bool) -> None:
    said: list[int] = []

    def mallopt(parameter: int, value: int) -> int:
        taken = parameter == TRIM_THRESHOLD or value <= most
        if taken:
            said.append(parameter)
        return int(taken)

    assert keep(mallopt) is kept
    assert sorted(said) == ([MMAP_THRESHOLD, TRIM_THRESHOLD] if kept else [])
