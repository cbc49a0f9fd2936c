"""Mixes sources: the source and row of each row of a step."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quintet.errors import ConfigError
from quintet.training.data.order import key, permutation, shares

# Rows are dealt out in blocks of so many, in each of which every source has its share exactly.
BLOCK = 1 << 14


class Fixed:
    """Weights that stay: every source is read from its first row on, and none is passed over.

    Args:
        weights: of the sources.
        seed: what the order follows from.

    Raises:
        ConfigError: a source has so little weight that it would never be read.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        exact = np.array(weights) / sum(weights) * BLOCK
        counts = np.floor(exact).astype(np.int64)
        # What is left over goes to those that lost most by rounding.
        order = np.argsort(counts - exact, kind="stable")
        counts[order[: BLOCK - int(counts.sum())]] += 1
        for weight, count in zip(weights, counts.tolist(), strict=True):
            if weight and not count:
                raise ConfigError(
                    f"data: a source of weight {weight:g} among {sum(weights):g} is less than one "
                    f"row in {BLOCK:,}, and would never be read; give it more"
                )
        self._counts, self._seed = counts, seed
        self._blocks: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def rows(self, first: int, n: int, weights: Sequence[float]) -> list[tuple[int, int]]:
        """Return the source of n rows from a number on, and each one's number there."""
        found = []
        for number in range(first, first + n):
            block, place = divmod(number, BLOCK)
            sources, numbers = self._block(block)
            found.append((int(sources[place]), int(numbers[place])))
        return found

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if block not in self._blocks:
            sources = np.repeat(np.arange(len(self._counts)), self._counts)
            sources = sources[permutation(key(self._seed, block), BLOCK)]
            numbers = np.zeros(BLOCK, np.int64)
            for source, count in enumerate(self._counts.tolist()):
                numbers[sources == source] = block * count + np.arange(count)
            self._blocks[block] = sources, numbers
            if len(self._blocks) > 2:
                self._blocks.popitem(last=False)
        return self._blocks[block]


class Drawn:
    """Weights that change: each row is drawn anew, and the rows of a source pass by meanwhile.

    Args:
        seed: what is drawn follows from.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def rows(self, first: int, n: int, weights: Sequence[float]) -> list[tuple[int, int]]:
        """Return the source of n rows from a number on, and each one's number there."""
        bounds = np.cumsum(weights) / sum(weights)
        drawn = np.searchsorted(bounds, shares(self._seed, n, first), side="right")
        last = max(i for i, weight in enumerate(weights) if weight)
        return [(min(int(source), last), first + i) for i, source in enumerate(drawn)]


Mixing = Fixed | Drawn
