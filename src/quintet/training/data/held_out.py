"""Documents that a model is measured by."""

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from quintet.ops.labels import IGNORED
from quintet.training.data.interface import Document
from quintet.training.data.store import Store


class HeldOut(Sequence[Document]):
    """Documents of stores, read from the disk on demand.

    Args:
        documents: the store of each one, and its number there.
        before: the id that stands before a text which the tokenizer puts nothing before, so that
            its first token is predicted from something; None for none.
    """

    def __init__(self, documents: Sequence[tuple[Store, int]], before: int | None) -> None:
        self._documents, self._before = documents, before

    def __len__(self) -> int:
        return len(self._documents)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> "HeldOut": ...
    def __getitem__(self, index: int | slice) -> "Document | HeldOut":
        if isinstance(index, slice):
            return HeldOut(self._documents[index], self._before)
        store, number = self._documents[index]
        end = int(store.ends[number])
        start = int(store.ends[number - 1]) if number else 0
        ids: NDArray[np.int64]
        if store.learned is None:
            ids = np.array(store.ids[start : end - store.closing], np.int64)
            if not store.opening and self._before is not None:
                ids = np.concatenate([np.array([self._before], np.int64), ids])
            labels = ids.copy()
            labels[: max(store.opening, 1)] = IGNORED
        else:
            ids = np.array(store.ids[start:end], np.int64)
            labels = np.where(store.learned[start:end], ids, IGNORED)
        return Document(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            bytes=int(store.bytes[number]),
            name=store.place(number),
        )
