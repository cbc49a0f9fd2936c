"""Pools of processes, for all tests of this folder."""

from collections.abc import Iterator

import pytest

from parallel.pool import Pool


@pytest.fixture(scope="package")
def two() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="package")
def four() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()
