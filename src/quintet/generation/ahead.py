"""Logits of a step that began before the token it follows was read."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Ahead(NamedTuple):
    """The logits (B, V) behind the last token of each sequence."""

    logits: Tensor
    row: int


def gathered(rows: Iterable[Ahead]) -> Tensor:
    """Return the logits (N, V) of rows."""
    rows = list(rows)
    whole = rows[0].logits
    if [one.row for one in rows] == list(range(len(whole))) and all(
        one.logits is whole for one in rows
    ):
        return whole
    return torch.cat([logits[row : row + 1] for logits, row in rows])
