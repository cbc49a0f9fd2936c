"""Pools of processes, for all tests of this folder."""

import pytest

from parallel.pool import Pool

TWO, FOUR = Pool(2), Pool(4)


@pytest.fixture(scope="session")
def two() -> Pool:
    return TWO


@pytest.fixture(scope="session")
def four() -> Pool:
    return FOUR


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path.parent != item.path.parent:
        # They look for messages as long as they live.
        for pool in (TWO, FOUR):
            pool.close()
