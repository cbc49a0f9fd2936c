"""Processes of one machine add up in memory that they share, as by messages."""

import pytest

from parallel.cases import shared_buffer
from parallel.pool import Pool, RankError
from quintet.kernels.native import available

pytestmark = pytest.mark.skipif(not available(), reason="kernels add up, and there are none here")


def test_sums_are_those_of_messages(two: Pool) -> None:
    two.run(shared_buffer.sums)


def test_sums_of_several_are_those_of_messages(four: Pool) -> None:
    four.run(shared_buffer.sums)


def test_what_is_not_a_number_stays_so(two: Pool) -> None:
    two.run(shared_buffer.not_numbers)


def test_what_all_have_is_joined(two: Pool) -> None:
    two.run(shared_buffer.joins)


def test_thousands_of_sums_keep_apart(two: Pool) -> None:
    two.run(shared_buffer.many)


def test_no_file_is_left(two: Pool) -> None:
    two.run(shared_buffer.has_no_name)


def test_who_does_not_come_is_named(two: Pool) -> None:
    two.run(shared_buffer.none_comes)


def test_who_ends_is_named() -> None:
    pool = Pool(2)
    try:
        with pytest.raises(RankError) as told:
            pool.run(shared_buffer.dies)
    finally:
        pool.close()
    # The process that was left raised nothing but what it had to.
    assert "rank 1: ended" in str(told.value)
    assert "rank 0" not in str(told.value)
