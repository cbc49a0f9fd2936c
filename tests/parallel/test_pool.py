"""Processes of the tests start with what they need."""

from parallel.cases import dividing
from parallel.pool import Pool


def test_what_takes_long_was_imported_before_the_fork(two: Pool) -> None:
    assert two.run(dividing.imported) == [True, True]
