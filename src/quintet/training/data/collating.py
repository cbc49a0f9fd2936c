"""Rows of texts to the tensors of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quintet.ops.labels import IGNORED
from quintet.training.batch import Batch


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text as it stands in a row.

    Attributes:
        ids: (T,) its ids.
        learned: (T,) whether each is learned, or None for all.
    """

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_] | None

    def labels(self, *, first: bool) -> NDArray[np.int64]:
        """Return the ids where they are learned; of the first only where it is asked for."""
        labels = self.ids.copy()
        if self.learned is not None:
            labels[~self.learned] = IGNORED
        if not first:
            labels[:1] = IGNORED
        return labels


def rectangle(rows: Sequence[Sequence[TokenizedText]], pad: int, *, borders: bool) -> Batch:
    """Return rows as rows, filled up to the longest where they are not equally long.

    Args:
        rows: the texts of each.
        pad: the id that rows are filled up with.
        borders: whether the texts of a row are told apart, which takes rows equally long.
    """
    joined = [_join(row, borders=borders) for row in rows]
    width = max(len(ids) for ids, _ in joined)
    ids = np.full((len(rows), width), pad, np.int64)
    labels = np.full((len(rows), width), IGNORED, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for place, (own, wanted) in enumerate(joined):
        ids[place, : len(own)], labels[place, : len(own)], mask[place, : len(own)] = own, wanted, 1
    several = borders and any(len(row) > 1 for row in rows)
    numbers = np.stack([_numbers(row) for row in rows]) if several else None
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        seq_idx=None if numbers is None else torch.from_numpy(numbers),
        attention_mask=None if mask.all() else torch.from_numpy(mask),
        texts=sum(len(row) for row in rows),
    )


def flat(rows: Sequence[Sequence[TokenizedText]]) -> Batch:
    """Return all texts in one row without padding, told apart by their numbers."""
    texts = [text for row in rows for text in row]
    ids, labels = _join(texts, borders=True)
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        seq_idx=torch.from_numpy(_numbers(texts))[None],
        texts=len(texts),
    )


def _join(
    row: Sequence[TokenizedText], *, borders: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids = np.concatenate([text.ids for text in row])
    # The first token of a text has nothing before it that could predict it.
    labels = [text.labels(first=i > 0 and not borders) for i, text in enumerate(row)]
    return ids, np.concatenate(labels)


def _numbers(row: Sequence[TokenizedText]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(row)), [len(text.ids) for text in row])
