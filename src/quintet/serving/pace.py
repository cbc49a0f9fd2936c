"""Sizes of prefill pieces, so that decoding continues meanwhile."""

from quintet.serving.limits import GRID, Limits

# A piece is not so short, nor what is left behind it, that few-token kernels would run over it.
LEAST_TAIL = 32
# Where nobody waits for a token, a piece may take so many seconds, after which a client that went
# is noticed, and it is no shorter than so many tokens for that.
ALONE, LEAST_ALONE = 1.0, 4 * GRID
# How much the last measurement counts.
WEIGHT = 0.3


class Pace:
    """Sizes prefill pieces by recent step times.

    Args:
        limits: the most tokens of a piece, and how long others may wait for a token.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._step: float | None = None
        self._token: float | None = None

    def stepped(self, seconds: float) -> None:
        """Record the duration of a step."""
        self._step = _mean(self._step, seconds)

    def read(self, tokens: int, seconds: float) -> None:
        """Record the duration of a whole piece."""
        if tokens >= GRID:
            self._token = _mean(self._token, seconds / tokens)

    def most(self, *, alone: bool) -> int:
        """Return the maximum piece, with or without concurrent decoding."""
        most, target = self.limits.piece, self.limits.itl_target_ms
        if target is None:
            return most
        if alone:
            in_time = int(ALONE / self._token) // GRID * GRID if self._token else LEAST_ALONE
            return min(most, max(in_time, LEAST_ALONE))
        if not self._token:
            # The first tells.
            return min(2 * GRID, most)
        budget = target / 1000 - (self._step or 0.0)
        return min(max(int(budget / self._token) // GRID * GRID, GRID), most)

    def piece(self, start: int, remaining: int, stops: tuple[int, ...], *, alone: bool) -> int:
        """Return the next piece: to the grid, to a stop, or the rest.

        Args:
            start: how many were read.
            remaining: how many were not.
            stops: where a piece has to end.
            alone: whether nobody else has a step meanwhile.
        """
        most, piece = self.most(alone=alone), remaining
        if remaining > most + LEAST_TAIL * alone:
            end = (start + most) // GRID * GRID
            if end - start <= LEAST_TAIL:
                end += GRID
            piece = end - start
            if remaining - piece <= LEAST_TAIL:
                # Who waits for a token waits rather twice than longer.
                shorter = piece - GRID
                piece = remaining if alone or shorter <= LEAST_TAIL else shorter
        return min([piece, *(stop - start for stop in stops if start < stop < start + piece)])


def _mean(mean: float | None, new: float) -> float:
    return new if mean is None else mean + WEIGHT * (new - mean)
