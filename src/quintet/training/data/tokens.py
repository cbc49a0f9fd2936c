"""Batches of the contents of stores."""

from collections.abc import Iterator, Sequence

from quintet.errors import ConfigError
from quintet.training.batch import Batch
from quintet.training.data.collating import flat, rectangle
from quintet.training.data.held_out import HeldOut
from quintet.training.data.mixing import Mixing
from quintet.training.data.pool import Pool
from quintet.training.data.settings import DataSettings, Packing
from quintet.training.progress import Progress
from quintet.training.schedule import Schedule
from quintet.training.spans import span


class TokenData:
    """Rows of the documents of pools, mixed by weights.

    Args:
        pools: what is read.
        weights: of each pool, as far as the training is.
        mixing: how rows are dealt out to them.
        settings: what decides how rows are made.
        packing: how rows are filled.
        pad: the id that rows are filled up with.
        held_out: what is not learned from.
        digest: of the contents of everything.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        weights: Sequence[Schedule],
        mixing: Mixing,
        settings: DataSettings,
        packing: Packing,
        pad: int,
        held_out: HeldOut,
        digest: str,
    ) -> None:
        self._pools, self._weights, self._mixing = pools, weights, mixing
        self._settings, self._packing = settings, packing
        self._pad, self._digest = pad, digest
        self._phases = [(span(phase.until, "until"), phase.context) for phase in settings.phases]
        self.context = max(context for _, context in self._phases)
        self.held_out = held_out

    @property
    def tokens(self) -> int:
        """The number of tokens of one pass over everything."""
        return sum(pool.tokens for pool in self._pools)

    @property
    def documents(self) -> int:
        """The number of documents, conversations or pairs."""
        return sum(pool.documents for pool in self._pools)

    @property
    def paired(self) -> bool:
        """Whether rows are pairs of answers."""
        return any(pool.paired for pool in self._pools)

    def parts(
        self, at: Progress, count: int = 1, share: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Yield the rows of the step that begins here, or a share, in at most `count` parts."""
        context = self._context_at(at)
        n = self._rows(context)
        index, shares = share
        if n < shares:
            raise ConfigError(
                f"data: a batch of {n} rows cannot be shared among {shares} processes; raise "
                "batch_rows or batch_tokens, or start fewer"
            )
        weights = [weight.at(at) for weight in self._weights]
        if min(weights) < 0 or not sum(weights):
            raise ConfigError(
                f"data: the weights of the sources are {weights} at step {at.step}; they have to "
                "be 0 or more, and not all 0"
            )
        drawn = self._mixing.rows(at.step * n, n, weights)
        # Parts as alike as they can be, the larger ones first.
        count = min(count, n // shares) * shares
        begin = 0
        for part in range(count):
            end = begin + n // count + (part < n % count)
            if part % shares == index:
                yield self._batch(drawn[begin:end], context)
            begin = end

    def fingerprint(self) -> str:
        """Return a digest that is equal if and only if equal steps read equal tokens."""
        return self._digest

    def _context_at(self, at: Progress) -> int:
        for until, context in self._phases:
            if until.of(at) < until.length:
                return context
        return self._phases[-1][1]

    def _rows(self, context: int) -> int:
        rows, tokens = self._settings.batch_rows, self._settings.batch_tokens
        if rows is None:
            assert tokens is not None
            rows = tokens // context
        return rows

    def _batch(self, drawn: Sequence[tuple[int, int]], context: int) -> Batch:
        found = [(self._pools[i], self._pools[i].row(number, context)) for i, number in drawn]
        if self.paired:
            rows = [
                [pool.text(piece, other) for piece in row]
                for other in (0, 1)
                for pool, row in found
            ]
            return rectangle(rows, self._pad, borders=False)
        rows = [[pool.text(piece) for piece in row] for pool, row in found]
        if self._packing == "whole" and self._settings.borders:
            return flat(rows)
        return rectangle(rows, self._pad, borders=self._settings.borders)
