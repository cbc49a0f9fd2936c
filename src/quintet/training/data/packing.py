"""Documents into rows: the contents of a row depend on its number alone."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from quintet.training.data.order import key, lots, permutation


class DocumentPiece(NamedTuple):
    """A part of a document.

    Attributes:
        document: its number among those that are learned from.
        start: where the part begins in it.
        stop: where it ends.
    """

    document: int
    start: int
    stop: int


class PackedRows(Protocol):
    """Rows without end: when all documents have been read, they come again in another order."""

    def row(self, number: int) -> Sequence[DocumentPiece]:
        """Return the contents of a row."""
        ...


@dataclass
class _Pass:
    """One time through all documents: their order, and where each ends in it."""

    order: NDArray[np.int64]
    ends: NDArray[np.int64]


class Stream:
    """Documents end to end without end, in a new order each time, cut into full rows.

    The rows that begin in one pass are shuffled, so that those of a step are not neighbours.

    Args:
        lengths: of the documents.
        context: how many tokens a row has.
        seed: what the orders follow from.
    """

    def __init__(self, lengths: NDArray[np.int64], context: int, seed: int) -> None:
        self._lengths, self._context, self._seed = lengths, context, seed
        self._total = int(lengths.sum())
        self._passes: OrderedDict[int, _Pass] = OrderedDict()
        self._shuffled: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def row(self, number: int) -> list[DocumentPiece]:
        """Return the contents of a row."""
        turn, offset = divmod(self._place(number) * self._context, self._total)
        found: list[DocumentPiece] = []
        missing = self._context
        while missing:
            now = self._pass(turn)
            index = int(np.searchsorted(now.ends, offset, side="right"))
            start = offset - (int(now.ends[index - 1]) if index else 0)
            for document in now.order[index : index + missing].tolist():
                stop = min(start + missing, int(self._lengths[document]))
                found.append(DocumentPiece(document, start, stop))
                missing -= stop - start
                start = 0
                if not missing:
                    break
            # The next pass begins in the middle of a row.
            turn, offset = turn + 1, 0
        return found

    def _place(self, number: int) -> int:
        """Return the place in the stream of a row of the shuffled ones."""
        turn = number * self._context // self._total
        first = -(-turn * self._total // self._context)
        if turn not in self._shuffled:
            after = -(-(turn + 1) * self._total // self._context)
            self._shuffled[turn] = permutation(key(self._seed, 1, turn), after - first)
            if len(self._shuffled) > 2:
                self._shuffled.popitem(last=False)
        return first + int(self._shuffled[turn][number - first])

    def _pass(self, turn: int) -> _Pass:
        if turn not in self._passes:
            order = permutation(key(self._seed, 0, turn), len(self._lengths))
            self._passes[turn] = _Pass(order, np.cumsum(self._lengths[order]))
            # A row can lie in two.
            if len(self._passes) > 2:
                self._passes.popitem(last=False)
        return self._passes[turn]


class Windows:
    """Full rows that begin anywhere in the documents, end to end in the order they came in.

    Args:
        lengths: of the documents.
        context: how many tokens a row has.
        seed: what the places follow from.
    """

    def __init__(self, lengths: NDArray[np.int64], context: int, seed: int) -> None:
        self._ends = np.cumsum(lengths)
        self._context, self._seed = context, seed
        self._places = int(self._ends[-1]) - context + 1

    def row(self, number: int) -> list[DocumentPiece]:
        """Return the contents of a row."""
        start = int(lots(self._seed, 1, number)[0]) % self._places
        stop = start + self._context
        found = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[index - 1]) if index else 0
            end = min(int(self._ends[index]), stop)
            found.append(DocumentPiece(index, start - begin, end - begin))
            start, index = end, index + 1
        return found


class Padded:
    """One piece of a document in a row, all of them in a new order each time.

    Args:
        pieces: (n, 3), the document of each piece, where it begins and where it ends.
        seed: what the orders follow from.
    """

    def __init__(self, pieces: NDArray[np.int64], seed: int) -> None:
        self._pieces, self._orders = pieces, _Orders(len(pieces), seed)

    def row(self, number: int) -> list[DocumentPiece]:
        """Return the contents of a row."""
        return [DocumentPiece(*self._pieces[self._orders.at(number)].tolist())]


class Whole:
    """Packs whole pieces into rows, reshuffled each epoch.

    Which pieces share a row stays. The longest are placed first, each where the least room is left
    that it fits into.

    Args:
        pieces: (n, 3), the document of each piece, where it begins and where it ends.
        context: how many tokens a row has at most.
        seed: what the orders follow from.
    """

    def __init__(self, pieces: NDArray[np.int64], context: int, seed: int) -> None:
        shuffled = pieces[permutation(key(seed, 0), len(pieces))]
        lengths = shuffled[:, 2] - shuffled[:, 1]
        longest_first = np.argsort(-lengths, kind="stable")
        bins = best_fit(lengths[longest_first].tolist(), context)
        by_row = np.argsort(bins, kind="stable")
        self._pieces = shuffled[longest_first[by_row]]
        self._ends = np.cumsum(np.bincount(bins))
        self._orders = _Orders(len(self._ends), key(seed, 1))

    def row(self, number: int) -> list[DocumentPiece]:
        """Return the contents of a row."""
        index = self._orders.at(number)
        start = int(self._ends[index - 1]) if index else 0
        return [
            DocumentPiece(*piece) for piece in self._pieces[start : int(self._ends[index])].tolist()
        ]

    def __len__(self) -> int:
        return len(self._ends)


class _Orders:
    """The numbers below n again and again, each time in another order."""

    def __init__(self, n: int, seed: int) -> None:
        self._n, self._seed = n, seed
        self._turn, self._order = -1, np.zeros(0, np.int64)

    def at(self, number: int) -> int:
        turn, place = divmod(number, self._n)
        if turn != self._turn:
            self._turn, self._order = turn, permutation(key(self._seed, turn), self._n)
        return int(self._order[place])


def best_fit(lengths: Sequence[int], room: int) -> NDArray[np.int64]:
    """Return the bin of each length, every bin holding at most `room`.

    Each goes to the bin with the least room left that it fits into, or to a new one.
    """
    bins = np.zeros(len(lengths), np.int64)
    by_room: list[list[int]] = [[] for _ in range(room + 1)]
    # Bit r is set where a bin has r left: the least that fits is found by arithmetic.
    rooms, count = 0, 0
    for place, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            smallest = length + (fitting & -fitting).bit_length() - 1
            index = by_room[smallest].pop()
            if not by_room[smallest]:
                rooms &= ~(1 << smallest)
        else:
            smallest, index, count = room, count, count + 1
        bins[place] = index
        by_room[smallest - length].append(index)
        rooms |= 1 << (smallest - length)
    return bins
