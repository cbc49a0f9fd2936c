"""Fits scales and offsets of weight groups, for `quintet.ops.groups`.

Of several scales that of a group is the one with the least error. Each begins as a share of the one
that just reaches the largest number, and is then fitted to what that rounds to: the two steps of
k-means, with levels on a ladder.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import InputError
from quintet.ops.error_feedback import ErrorSpread, Rounding, feed_back, spread_of
from quintet.ops.groups import IQ4, group_count, number_shape, pack_numbers

# Small enough that a band in float32 stays in the cache between its operations.
BAND = 2**18
# Column by column, an operation is of one number a row: so many that it is worth it.
MANY = 2**23
# Shares of the scale that reaches the largest number, of 4 bits; the first wins among equals.
SHARES = (1.0, 0.75, 0.8125, 0.875, 0.9375, 1.0625, 1.125)
# What is cut off at both ends, where there are offsets.
CUTS = (0.0, 0.1)


def quantize_groups(
    weight: Tensor,
    bits: int,
    group: int | None,
    *,
    offset: bool = False,
    dtype: torch.dtype = torch.float16,
    iq4: bool = False,
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round each group to multiples of a scale, with an offset if asked.

    Args:
        weight: (..., O, I).
        bits: 8 or 4.
        group: how many neighbours share a scale; None for whole rows.
        dtype: of scales and offsets.
        iq4: round to the levels of `IQ4`.
        gram: (I, I), Σ x xᵀ of inputs, by which columns make up for what others lost.

    Returns numbers, scales and offsets as `widen_groups` takes them.

    Raises:
        InputError: a weight is not finite, or too large for a scale of `dtype`.
    """
    columns = weight.shape[-1]
    count = group_count(columns, group)
    size = max(columns, 1) if group is None else group
    numbers = weight.new_empty(
        number_shape(tuple(weight.shape), bits), dtype=torch.int8 if bits == 8 else torch.uint8
    )
    scale = weight.new_empty((*weight.shape[:-1], count), dtype=dtype)
    offsets = torch.empty_like(scale) if offset else None
    # What fills up the last group counts nothing.
    counts = torch.ones(columns, dtype=torch.float32, device=weight.device)
    counts = F.pad(counts, (0, count * size - columns)).view(count, size)
    flat = weight.reshape(-1, columns)
    spread = None if gram is None else spread_of(gram.to(weight.device), count * size)
    height = max((BAND if spread is None else MANY) // max(columns, 1), 1)
    ladder = _Ladder(bits, offset, iq4, dtype)
    for start in range(0, len(flat), height):
        rows = slice(start, start + height)
        band = flat[rows].to(torch.float32)
        # The last group is filled up by what changes neither its largest nor its smallest number.
        band = F.pad(band[None], (0, count * size - columns), mode="replicate")[0]
        if spread is None:
            groups = torch.unflatten(band, -1, (count, size))
            fit = ladder.fit(groups, ladder.importance(groups) * counts)
        else:
            fit = ladder.fit_in_turn(band.clone(), size, spread)
        to = ladder.numbers(fit.levels).flatten(-2)[..., :columns]
        numbers.view(-1, numbers.shape[-1])[rows] = to if bits == 8 else pack_numbers(to)
        scale.view(-1, count)[rows] = fit.scale.squeeze(-1).to(dtype)
        if offsets is not None:
            offsets.view(-1, count)[rows] = fit.offset.squeeze(-1).to(dtype)
    return numbers, scale, offsets


class _Fit(NamedTuple):
    """Groups (R, G, n) rounded to levels, with scales and offsets (R, G, 1)."""

    levels: Tensor
    scale: Tensor
    offset: Tensor

    def error(self, band: Tensor, counts: Tensor) -> Tensor:
        """Return Σ counts · error² of each group."""
        decoded = self.levels * self.scale + self.offset
        return (counts * (decoded - band).square_()).sum(-1, keepdim=True)


class _Ladder:
    """The unscaled levels of a layout."""

    def __init__(self, bits: int, offset: bool, iq4: bool, dtype: torch.dtype) -> None:
        self.bits, self.offset, self.iq4, self.dtype = bits, offset, iq4, dtype
        ends = {(8, False): (-127, 127), (8, True): (-128, 127), (4, False): (-8, 7)}
        self.least, self.most = (IQ4[0], IQ4[-1]) if iq4 else ends.get((bits, offset), (0, 15))

    def importance(self, band: Tensor) -> Tensor | float:
        """Return by what the squared errors of numbers count, where no text says it.

        With one scale for both ends, to cut off large numbers would be cheap, and they are those
        that models lean on (docs/lab-notes.md): √(x² + mean x²), as llama.cpp counts.
        """
        if self.bits == 8 or self.offset or self.iq4:
            return 1.0
        squares = band.square()
        return (squares + squares.mean(-1, keepdim=True)).sqrt_()

    def fit(self, band: Tensor, counts: Tensor) -> _Fit:
        """Round groups (R, G, n) with the best scales and offsets.

        Raises:
            InputError: a number is not finite, or too large for a scale.
        """
        low, high = band.aminmax(dim=-1, keepdim=True)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise InputError(
                "a weight that is NaN or infinite cannot be quantised; the checkpoint is damaged "
                "or its training diverged"
            )
        starts = list(self._starts(low, high))
        best = self._rounded(band, *starts[0])
        if self.bits == 8:
            return best
        error = best.error(band, counts)
        for start in starts:
            fitted = self._fitted(band, counts, self._rounded(band, *start))
            tried = self._rounded(band, *fitted)
            less = tried.error(band, counts)
            better = less < error
            error = torch.where(better, less, error)
            pairs = zip(tried, best, strict=True)
            best = _Fit(*(torch.where(better, new, old) for new, old in pairs))
        return best

    def fit_in_turn(self, band: Tensor, size: int, spread: ErrorSpread) -> _Fit:
        """Round rows (R, G · n) group by group, with errors fed back; `band` is changed."""
        fits: list[_Fit] = []

        def begin(own: Tensor, squares: Tensor) -> Rounding:
            fit = self.fit(own[:, None], squares)
            fits.append(fit)

            def rounded(column: Tensor, place: int) -> Tensor:
                fitted = self._rounded(column[:, None, None], fit.scale, fit.offset)
                fit.levels[:, 0, place] = fitted.levels[:, 0, 0]
                return (fitted.levels * fitted.scale + fitted.offset)[:, 0, 0]

            return rounded

        feed_back(band, size, spread, begin)
        return _Fit(*(torch.cat(part, dim=1) for part in zip(*fits, strict=True)))

    def numbers(self, levels: Tensor) -> Tensor:
        """Return levels as stored."""
        if self.iq4:
            places = levels.new_zeros(IQ4[-1] - IQ4[0] + 1, dtype=torch.uint8)
            for place, level in enumerate(IQ4):
                places[level - IQ4[0]] = place
            return _taken(places, levels - IQ4[0])
        return levels + 8 if self.bits == 4 and not self.offset else levels

    def _starts(self, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield initial scales and offsets; the first cover the whole range."""
        if self.offset:
            for cut in CUTS:
                scale = self._stored((high - low) * ((1 - cut) / (self.most - self.least)))
                yield scale, self._stored(low * (1 - cut) - self.least * scale)
            return
        extreme = torch.where(-low > high, low, high)
        for share in SHARES:
            yield self._stored(extreme * (share / self.least)), torch.zeros_like(extreme)

    def _rounded(self, band: Tensor, scale: Tensor, offset: Tensor) -> _Fit:
        steps = (band - offset) / torch.where(scale == 0, 1.0, scale)
        levels = _nearest(steps) if self.iq4 else steps.round_().clamp_(self.least, self.most)
        return _Fit(levels, scale, offset)

    def _fitted(self, band: Tensor, counts: Tensor, fit: _Fit) -> tuple[Tensor, Tensor]:
        """Return least-squares scales and offsets for given levels."""
        q = fit.levels
        wq = counts * q
        xq, qq = (wq * band).sum(-1, keepdim=True), (wq * q).sum(-1, keepdim=True)
        if not self.offset:
            scale = torch.where(qq > 0, xq / qq, fit.scale)
            return self._stored(scale), fit.offset
        one = counts.sum(-1, keepdim=True).expand_as(qq)
        x, sum_q = (counts * band).sum(-1, keepdim=True), wq.sum(-1, keepdim=True)
        # Of numbers that are nearly alike nothing can be told.
        det = one * qq - sum_q.square()
        solvable = det > 1e-6 * one * qq
        scale = torch.where(solvable, (one * xq - sum_q * x) / det, fit.scale)
        offset = torch.where(solvable, (qq * x - sum_q * xq) / det, fit.offset)
        return self._stored(scale), self._stored(offset)

    def _stored(self, values: Tensor) -> Tensor:
        # Numbers are rounded with scales as they are stored.
        stored = values.to(self.dtype).to(torch.float32)
        if not bool(stored.isfinite().all()):
            raise InputError(
                "a weight is too large for scales in "
                f"{str(self.dtype).removeprefix('torch.')}; use scales in float32"
            )
        return stored


def _nearest(steps: Tensor) -> Tensor:
    """Return the nearest `IQ4` level of each number, ties to the lower one."""
    # They meet at halves, so that all numbers up to one half from the one before have one level.
    table = steps.new_tensor(IQ4)
    halves = torch.arange(2 * IQ4[0], 2 * IQ4[-1] + 1, dtype=steps.dtype, device=steps.device) / 2
    levels = table[torch.bucketize(halves, (table[1:] + table[:-1]) / 2)]
    up = steps.mul_(2).ceil_().clamp_(2 * IQ4[0], 2 * IQ4[-1])
    return _taken(levels, up.sub_(2 * IQ4[0]))


def _taken(table: Tensor, places: Tensor) -> Tensor:
    """Look up a table at integer indices."""
    index = places.to(torch.int32).flatten()
    return table.index_select(0, index).view(places.shape)
