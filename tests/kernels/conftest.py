"""Every kernel is tested on the best and the least instruction set of this machine.

Or on the one that QUINTET_KERNELS names: those in between are written as one of the two is, but for
some lines, and compiling takes half a minute each. The workflow asks for them.

The best one is compiled as it is for users, and so is one that is asked for; the least hastily:
what differs between levels is what is written for them, and optimising it takes a minute.
"""

import os
from collections.abc import Iterator

import pytest

from quintet.kernels.build import LEVELS, best_level, find_compiler
from quintet.kernels.store import BuildError
from unlooked import forget_kernels


def levels() -> list[str]:
    asked = os.environ.get("QUINTET_KERNELS", "")
    try:
        find_compiler()
        best = best_level(asked if asked in LEVELS else None)
    except BuildError:
        return []
    return [best] if asked == "1" or asked in LEVELS else list(dict.fromkeys((best, [*LEVELS][-1])))


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
