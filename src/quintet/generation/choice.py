"""Takes a token from scores, greedily or by sampling, with options per row."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quintet.generation.processors import warpers as warping
from quintet.generation.processors.base import LogitsWarper
from quintet.generation.processors.warpers import TemperatureLogitsWarper, TopKLogitsWarper
from quintet.ops import sampling


class Chosen(NamedTuple):
    """Tokens that were taken but not read yet.

    Attributes:
        tokens: (B,).
        best: (B,) the largest of the scores that each was taken of, in float32; where that is
            infinite or no number, there was no token to take, and that of `tokens` is any.
    """

    tokens: Tensor
    best: Tensor


class TokenChoice:
    """Takes a token for each row of scores (B, V).

    Args:
        warpers: what reshapes the scores before, in order.
        do_sample: draw from the distribution, rather than take the likeliest token.
    """

    def __init__(self, warpers: Sequence[LogitsWarper] = (), *, do_sample: bool = False) -> None:
        self.do_sample = do_sample
        self.warpers = list(warpers)
        bound = _bound(self.warpers)
        # How many tokens are there for what follows top-k, where that is so few in every row.
        self._k: int | None = None
        if do_sample and bound is not None and not isinstance(bound.top_k, Tensor):
            self._k = bound.top_k
        # Of the few that top-k leaves, it leaves all.
        self._few = [warper for warper in self.warpers if warper is not bound]

    @property
    def kind(self) -> Hashable:
        """A key that is equal for choices that `beside` can join.

        A sum over another number of tokens may differ in its last digit: rows whose top-k is not
        the same do not share one.
        """
        return self.do_sample, self._k, *(warping.kind(warper) for warper in self.warpers)

    @classmethod
    def stack(cls, choices: Sequence["TokenChoice"]) -> "TokenChoice":
        """Join choices of one kind, a row each, into one with values per row."""
        columns = zip(*(choice.warpers for choice in choices), strict=True)
        return cls([warping.stack(column) for column in columns], do_sample=choices[0].do_sample)

    def choose(
        self,
        scores: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        unfinished: Tensor | None = None,
        *,
        step: int | None = None,
        u: Tensor | None = None,
    ) -> Tensor:
        """Take a token per row, (B,), like `take(warped(scores))` but faster.

        Where top-k bounds the distribution, all behind it happens to those few tokens alone. The
        other arguments are those of `take`.

        Raises:
            NothingLeftError: a row has no token left, or its scores hold NaN or infinity.
        """
        chosen = self.launch(scores, generators, u=u)
        sampling.check_left(chosen.best.tolist(), unfinished, step)
        return chosen.tokens

    def launch(
        self,
        scores: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        *,
        u: Tensor | None = None,
    ) -> Chosen:
        """Take a token per row like `choose`, without waiting for the device.

        Nobody waits for the device of the scores (B, V).
        """
        if self.do_sample:
            if u is None:
                u = sampling.uniform((len(scores), 1), scores.device, generators)
            drawn = self._drawn(scores, u)
            if drawn is None and scores.device.type == "cpu":
                # Whether a few candidates are all there are, a device would be asked.
                drawn = self._of_few(scores, u)
            if drawn is not None:
                return drawn
        return self.launch_taking(self.warped(scores), u=u)

    def launch_taking(
        self,
        scores: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        *,
        u: Tensor | None = None,
    ) -> Chosen:
        """Take a token per row from warped scores (B, V), without waiting for the device."""
        if not self.do_sample:
            best, tokens = sampling.likeliest(scores)
            return Chosen(tokens, best)
        if u is None:
            u = sampling.uniform((len(scores), 1), scores.device, generators)
        return Chosen(sampling.drawn(scores.softmax(dim=-1), u), scores.amax(dim=-1))

    def _of_few(self, scores: Tensor, u: Tensor) -> Chosen | None:
        """Draw from the few tokens that top-k leaves, if it bounds the distribution."""
        few = None if self._k is None else sampling.top_k_candidates(scores, self._k)
        if few is None:
            return None
        values, ids, crowded = few
        index, best = self.launch_taking(_warped(self._few, values), u=u)
        tokens = ids.gather(1, index[:, None])[:, 0]
        if crowded is None:
            return Chosen(tokens, best)
        # Row by row: which way is taken must not depend on the other rows.
        rows = crowded.nonzero()[:, 0]
        warpers = [warping.of_rows(warper, rows) for warper in self.warpers]
        rest = self.launch_taking(_warped(warpers, scores[rows]), u=u[rows])
        return Chosen(tokens.index_copy(0, rows, rest.tokens), best.index_copy(0, rows, rest.best))

    def _drawn(self, scores: Tensor, u: Tensor) -> Chosen | None:
        """Draw in one fused pass, if a backend supports all warpers."""
        cuts = warping.cuts(self.warpers)
        drawn = None if cuts is None else sampling.draw_in_one_pass(scores, u, **cuts)
        return None if drawn is None else Chosen(*drawn)

    def on(self, device: torch.device) -> "TokenChoice":
        """Move the values per row to a device."""
        warpers = [warping.on(warper, device) for warper in self.warpers]
        return TokenChoice(warpers, do_sample=self.do_sample)

    def take(
        self,
        scores: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        unfinished: Tensor | None = None,
        *,
        step: int | None = None,
        u: Tensor | None = None,
    ) -> Tensor:
        """Take a token per row, (B,), from warped scores (B, n).

        Args:
            scores: what is taken from.
            generators: where the randomness of each row comes from; torch's own if not given.
            unfinished: (B,) True for rows that need a token, others get any; None for all.
            step: which new token it is, from 1, for the message of an error.
            u: (B, 1) numbers of [0, 1) to draw by.

        Raises:
            NothingLeftError: a row has no token left, or its scores hold NaN or infinity.
        """
        chosen = self.launch_taking(scores, generators, u=u)
        sampling.check_left(chosen.best.tolist(), unfinished, step)
        return chosen.tokens

    def warped(self, scores: Tensor) -> Tensor:
        """Apply the warpers to scores (B, V)."""
        return _warped(self.warpers, scores)

    def warped_positions(self, scores: Tensor) -> Tensor:
        """Apply the warpers to scores (B, P, V) after top-k."""
        B, P, V = scores.shape
        scores = scores.reshape(B * P, V)
        few = None if self._k is None else sampling.top_k_candidates(scores, self._k)
        if few is None:
            return _warped(self._at(self.warpers, B, P), scores).reshape(B, P, V)
        values, ids, crowded = few
        values = _warped(self._at(self._few, B, P), values)
        warped = torch.full_like(scores, -torch.inf).scatter_(1, ids, values)
        if crowded is not None:
            rows = crowded.nonzero()[:, 0]
            whole = [warping.of_rows(warper, rows // P) for warper in self.warpers]
            warped[rows] = _warped(whole, scores[rows])
        return warped.reshape(B, P, V)

    def _at(self, warpers: list[LogitsWarper], B: int, P: int) -> list[LogitsWarper]:
        if P == 1:
            return warpers
        rows = torch.arange(B, device="cpu", dtype=torch.long).repeat_interleave(P)
        return [warping.of_rows(warper, rows) for warper in warpers]


def _warped(warpers: Sequence[LogitsWarper], scores: Tensor) -> Tensor:
    for warper in warpers:
        scores = warper.warp(scores)
    return scores


def _bound(warpers: Sequence[LogitsWarper]) -> TopKLogitsWarper | None:
    """Return the top-k, if only a temperature precedes it."""
    for warper in warpers:
        if type(warper) is TopKLogitsWarper and warper.filter_value == -torch.inf:
            return warper
        if type(warper) is not TemperatureLogitsWarper:
            return None
    return None
