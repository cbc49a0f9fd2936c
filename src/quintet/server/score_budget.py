"""A bound of the scores of tokens that are kept until answers are whole, of all requests."""

from collections.abc import Iterator
from contextlib import contextmanager

from quintet.server.failures import invalid, unavailable


class ScoreBudget:
    """Counts kept scores, some 350 bytes each; belongs to the event loop.

    Args:
        most: how many there may be at once.
    """

    def __init__(self, most: int) -> None:
        self._most, self._reserved = most, 0

    def check(self, count: int, param: str) -> None:
        """Refuse this many scores if there is no room for them.

        Args:
            count: the most that a request comes to.
            param: the field that asks for them.

        Raises:
            ApiError: they are too many by themselves (400), or with those of others (503).
        """
        if count > self._most:
            raise invalid(
                f"{param}: the answers come to {count:,} scores of tokens, and at most "
                f"{self._most:,} are kept until an answer is whole; ask for fewer of them, for "
                "fewer answers or tokens, or for a stream of /v1/completions or chat",
                param,
            )
        if self._reserved + count > self._most:
            raise unavailable(
                "as many scores of tokens as may be are kept for other answers; try again",
                "scores_full",
            )

    @contextmanager
    def taken(self, count: int, param: str) -> Iterator[None]:
        """Count this many scores for the duration of the context.

        Arguments and errors are those of `check`.
        """
        self.check(count, param)
        self._reserved += count
        try:
            yield
        finally:
            self._reserved -= count
