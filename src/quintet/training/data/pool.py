"""The documents of a store that are learned from, as rows of any length."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from quintet.errors import ConfigError, DataError
from quintet.training.data.collating import TokenizedText
from quintet.training.data.order import key
from quintet.training.data.packing import DocumentPiece, PackedRows, Padded, Stream, Whole, Windows
from quintet.training.data.settings import DataSettings, Packing
from quintet.training.data.store import Store

# Rows of so many lengths are kept planned; phases of a training come one after the other.
PLANS = 2


def packing_of(settings: DataSettings, kinds: set[str]) -> Packing:
    """Return the packer for a way of filling rows.

    Raises:
        ConfigError: pairs are to share rows, or only plain text can be read in windows.
    """
    natural: Packing = "stream" if kinds == {"text"} else "whole"
    if kinds == {"pairs"}:
        natural = "padded"
    packing = settings.packing or natural
    if "pairs" in kinds and packing != "padded":
        raise ConfigError(
            f"data.packing = '{packing}': the two answers of a pair stand in rows beside each "
            "other; leave it out, or set it to 'padded'"
        )
    if settings.windows == "random" and packing != "stream":
        raise ConfigError(
            f"data.windows = 'random' takes rows from a stream, not packing = '{packing}'; leave "
            "one of them out"
        )
    return packing


def lots_of(store: Store) -> NDArray[np.float64]:
    """Return a number of [0, 1) for each document that follows from its text alone."""
    return (np.asarray(store.hashes) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Pool:
    """Documents that are read with one weight.

    Args:
        store: where they are.
        settings: how rows are made of them.
        packing: how rows are filled.
        seed: what the order follows from.
        tell: called with what is left out of rows.

    Attributes:
        tokens: how many tokens they have.
        documents: how many documents, conversations or pairs they are.

    Raises:
        DataError: all documents are held out.
    """

    def __init__(
        self,
        store: Store,
        settings: DataSettings,
        packing: Packing,
        seed: int,
        tell: Callable[[str], None],
    ) -> None:
        self._store, self._settings, self._packing = store, settings, packing
        self._seed, self._tell = seed, tell
        self._starts = store.starts
        lengths = np.asarray(store.ends) - self._starts
        self.paired = store.kind == "pairs"
        selected = (lots_of(store) >= settings.held_out) & (lengths > 0)
        self._documents = (
            np.flatnonzero(selected[::2]) * 2 if self.paired else np.flatnonzero(selected)
        )
        if not len(self._documents):
            raise DataError(
                f"data: none of the {len(store)} documents is left to learn from with "
                f"held_out = {settings.held_out:g}; hold out fewer"
            )
        own = lengths[self._documents]
        self.tokens = int(own.sum())
        if self.paired:
            others = lengths[self._documents + 1]
            self.tokens += int(others.sum())
            own = np.maximum(own, others)
        self._lengths = own
        self.documents = len(self._documents)
        self._plans: dict[int, PackedRows] = {}

    def row(self, number: int, context: int) -> Sequence[DocumentPiece]:
        """Return the pieces of a row of this many tokens."""
        if context not in self._plans:
            if len(self._plans) >= PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[context] = self._plan(context)
        return self._plans[context].row(number)

    def text(self, piece: DocumentPiece, other: int = 0) -> TokenizedText:
        """Return a part of a document; of a pair's the preferred one, or the other."""
        document = int(self._documents[piece.document]) + other
        start = int(self._starts[document])
        end = min(start + piece.stop, int(self._store.ends[document]))
        start += piece.start
        ids = np.array(self._store.ids[start:end], np.int64)
        learned = self._store.learned
        return TokenizedText(
            ids, None if learned is None else np.array(learned[start:end], np.bool_)
        )

    def _plan(self, context: int) -> PackedRows:
        seed = key(self._seed, context)
        if self._packing == "stream":
            if self._settings.windows == "random":
                if self.tokens < context:
                    raise ConfigError(
                        f"data.context = {context} is more than the {self.tokens:,} tokens there "
                        "are; make it smaller"
                    )
                return Windows(self._lengths, context, seed)
            return Stream(self._lengths, context, seed)
        pieces = self._pieces(context)
        if self._packing == "padded":
            return Padded(pieces, seed)
        return Whole(pieces, context, seed)

    def _pieces(self, context: int) -> NDArray[np.int64]:
        """Return (n, 3), the parts of documents that are to stay whole in a row."""
        lengths = self._lengths
        long = np.flatnonzero(lengths > context)
        fitting = np.flatnonzero(lengths <= context)
        pieces = [np.stack([fitting, np.zeros_like(fitting), lengths[fitting]], axis=1)]
        if len(long):
            pieces += self._cut(long, context)
        found = np.concatenate(pieces)
        if not len(found):
            raise DataError(
                f"data: no document fits into data.context = {context}; make it larger, or set "
                "data.too_long = 'cut'"
            )
        return found[np.argsort(found[:, 0], kind="stable")]

    def _cut(self, long: NDArray[np.int64], context: int) -> list[NDArray[np.int64]]:
        """Return the documents to learn from, the too long ones cut or left out, and report it."""
        first = self._store.place(int(self._documents[long[0]]))
        finding = f"{len(long)} of {self.documents} documents are longer than {context} tokens"
        if self._settings.too_long == "bad":
            raise DataError(
                f"{first}: {int(self._lengths[long[0]])} tokens are more than data.context = "
                f"{context} ({finding}); make that larger, or set data.too_long = 'cut' or 'drop'"
            )
        if self._settings.too_long == "drop":
            self._tell(f"data: {finding} and left out; the first is {first}")
            return []
        parts = [self._parts(int(document), context) for document in long]
        found = [part for several in parts for part in several]
        tokens = int(self._lengths[long].sum()) - sum(stop - start for _, start, stop in found)
        lost = f"; {tokens:,} tokens are left out" if tokens else ""
        self._tell(f"data: {finding} and cut{lost}; the first is {first}")
        return [np.array(found, np.int64).reshape(-1, 3)]

    def _parts(self, document: int, context: int) -> list[tuple[int, int, int]]:
        length = int(self._lengths[document])
        # A text goes on in the next row; what is behind the beginning of a conversation would
        # be learned without what it answers.
        last = length if self._store.learned is None else context
        parts = [
            (document, start, min(start + context, length)) for start in range(0, last, context)
        ]
        return [part for part in parts if self._anything(DocumentPiece(*part))]

    def _anything(self, piece: DocumentPiece) -> bool:
        """Return whether a part has labels; of a pair, both answers."""
        texts = [self.text(piece, other) for other in range(1 + self.paired)]
        return all(text.learned is None or text.learned[1:].any() for text in texts)
