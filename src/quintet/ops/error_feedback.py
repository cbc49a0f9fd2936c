"""Rounds the columns of a weight one by one, and corrects the others for each one's error.

GPTQ (arXiv:2210.17323), §3: with H = Σ x xᵀ of inputs x, what a matrix computes changes least if
the error of a column is spread over those behind it, not rounded yet, by the inverse of H.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import InputError

# Of the mean of H's diagonal, added to it: what a text did not show is not free.
DAMPING = 0.01
# Rounds a column (R,) of a group, of a given place in it, to numbers.
Rounding = Callable[[Tensor, int], Tensor]


class ErrorSpread(NamedTuple):
    """A matrix by which rounding errors are spread.

    Attributes:
        upper: U (I, I), upper triangular with UᵀU = (H + λI)⁻¹. Its row j, divided by the diagonal,
            is how the error of column j is spread over those behind it (eq. 3, by Cholesky).
        squares: (I,) how much errors count by their column.
    """

    upper: Tensor
    squares: Tensor


def spread_of(gram: Tensor, columns: int) -> ErrorSpread:
    """Return the matrix that spreads errors, of H = `gram` (I, I) filled up to more columns.

    Columns that were always zero, and those that fill up, take part in nothing.

    Raises:
        InputError: an input was not finite.
    """
    own = gram.to(torch.float32)
    if not bool(own.isfinite().all()):
        raise InputError("an input of the text is not finite; run the model in bfloat16 or float32")
    mean = own.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    padding = columns - len(own)
    squares = F.pad(own.diagonal() + DAMPING * mean, (0, padding))
    H = F.pad(own, (0, padding, 0, padding))
    H.diagonal()[H.diagonal() == 0] = mean
    damping = DAMPING * mean
    failed = 1
    while failed:
        H.diagonal().add_(damping)
        upper, info = torch.linalg.cholesky_ex(H)
        if not info:
            # An inverse of large and small numbers may be rounded to what is none.
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(upper), upper=True)
        failed, damping = int(info), 10 * damping
    return ErrorSpread(upper, squares)


def feed_back(
    weight: Tensor, group: int, spread: ErrorSpread, begin: Callable[[Tensor, Tensor], Rounding]
) -> None:
    """Round a weight (R, I), which this changes, group by group of neighbours.

    Args:
        group: how many of them share a scale.
        begin: given the columns (R, n) of a group, as what was lost before left them, and how much
            errors of each count, returns how they are rounded.
    """
    upper, columns = spread.upper, weight.shape[1]
    for start in range(0, columns, group):
        end = min(start + group, columns)
        own = weight[:, start:end]
        rounded = begin(own, spread.squares[start:end])
        errors = torch.empty_like(own)
        for place in range(end - start):
            column = start + place
            errors[:, place] = (own[:, place] - rounded(own[:, place], place)) / upper[
                column, column
            ]
            own[:, place + 1 :] -= errors[:, place, None] * upper[column, column + 1 : end]
        weight[:, end:] -= errors @ upper[start:end, end:]
