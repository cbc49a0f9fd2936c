"""Every kernel is tested on every instruction set of this machine, or on the one asked for.

The best one is compiled as it is for users, and so is one that is asked for; the others hastily:
what differs between levels is what is written for them, and optimising it takes a minute.
"""

import os
from collections.abc import Iterator

import pytest

from quintet.kernels.build import LEVELS, best_level, find_compiler
from quintet.kernels.store import BuildError
from unlooked import forget_kernels


def levels() -> list[str]:
    try:
        find_compiler()
        best = list(LEVELS).index(best_level())
    except BuildError:
        return []
    asked = os.environ.get("QUINTET_KERNELS", "")
    if asked == "1":
        return [best_level()]
    if asked in LEVELS:
        return [asked]
    # What avx512_vnni has is in avx512_bf16 too.
    return [level for level in list(LEVELS)[best:] if level != "avx512_vnni"]


@pytest.fixture(params=levels() or [pytest.param("", marks=pytest.mark.skip("no kernels here"))])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The instruction set that the kernels of this test are compiled for."""
    if request.param != levels()[0]:
        further = os.environ.get("QUINTET_KERNELS_FLAGS", "")
        monkeypatch.setenv("QUINTET_KERNELS_FLAGS", f"{further} -Og")
    monkeypatch.setenv("QUINTET_KERNELS", request.param)
    forget_kernels()
    yield request.param
    forget_kernels()
