"""Drafts: their tokens, their number, and the drafters that propose them."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from quintet.generation.processors.base import ConstrainingProcessor
from quintet.generation.sampler import Sampler
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.sampling import likeliest


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted tokens (B, K); the first `counts` of each row are valid.

    `probabilities` (B, K, V) are what they were drawn from, or None if nothing was drawn.
    """

    tokens: Tensor
    counts: list[int]
    probabilities: Tensor | None = None

    @classmethod
    def none(cls, text: TokenBuffer) -> "Draft":
        """Return an empty draft."""
        return cls(text.ids[:, :0], [0] * len(text.ids))

    def numbers(self) -> Tensor:
        """Pack tokens and counts into one tensor, (B, K + 1)."""
        counts = self.tokens.new_tensor(self.counts)
        return torch.cat((self.tokens, counts[:, None]), dim=1)

    @classmethod
    def of_numbers(cls, numbers: Tensor) -> "Draft":
        """Unpack such a tensor."""
        return cls(numbers[:, :-1], numbers[:, -1].tolist())


class Drafter(Protocol):
    """Interface of a drafter."""

    def propose(
        self, text: TokenBuffer, wanted: list[int], unfinished: list[bool], sampler: Sampler
    ) -> Draft:
        """Draft up to `wanted` tokens behind each unfinished row."""
        ...

    def accepted(self, counts: list[int]) -> None:
        """Learn the number of tokens that each row took of the last forward; 0 at its end."""
        ...

    def finish(self, text: TokenBuffer) -> None:
        """Learn the whole text, if its cache will be continued."""
        ...

    def close(self) -> None:
        """Release resources after the generation, or its failure."""
        ...


@dataclass(slots=True)
class DraftSchedule:
    """The number of tokens to draft for each row.

    "constant" is that many always. The heuristics draft two more after all were accepted, and one
    less after not; as each row has its own number, it does not depend on the others.
    """

    tokens: int
    name: str = "constant"
    rows: list[int] = field(default_factory=list)

    def start(self, B: int) -> None:
        """Begin with this many rows."""
        self.rows = [self.tokens] * B

    def learn(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn the numbers of drafted and accepted tokens per row."""
        if self.name == "constant":
            return
        for row, (count, stayed) in enumerate(zip(drafted, accepted, strict=True)):
            if count:
                change = 2 if stayed == count else -1
                self.rows[row] = max(1, self.rows[row] + change)


class PromptLookup:
    """Drafts the tokens behind an earlier occurrence of a row's last tokens.

    Where a constraint forces tokens, these are the draft; where it forbids one, the draft ends.

    Args:
        ngram: how many tokens at the end are looked for at the most; fewer are tried if these
            did not occur before.
    """

    def __init__(self, ngram: int = 2) -> None:
        self.ngram = ngram

    def propose(
        self, text: TokenBuffer, wanted: list[int], unfinished: list[bool], sampler: Sampler
    ) -> Draft:
        """Draft from each row's own past."""
        agreement = sampler.agreement
        if agreement is None:
            return self._look_up(text, wanted, sampler)
        # A constraint is there only in the process that chooses.
        return Draft.of_numbers(
            agreement.decided(
                lambda: self._look_up(text, wanted, sampler).numbers(), text.ids.device
            )
        )

    def _look_up(self, text: TokenBuffer, wanted: list[int], sampler: Sampler) -> Draft:
        rows = [
            row[len(row) - length :]
            for row, length in zip(text.ids, text.lengths().tolist(), strict=True)
        ]
        constraints = sampler.constraints
        found = [
            self._constrained(constraints, index, row, count)
            if constraints and count
            else self._continuation(row, count)
            for index, (row, count) in enumerate(zip(rows, wanted, strict=True))
        ]
        K = max(len(tokens) for tokens in found)
        tokens = text.ids.new_zeros(len(found), K)
        for row, continuation in enumerate(found):
            tokens[row, : len(continuation)] = continuation
        return Draft(tokens, [len(continuation) for continuation in found])

    def accepted(self, counts: list[int]) -> None:
        """Do nothing: a draft follows from the text."""

    def finish(self, text: TokenBuffer) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def _constrained(
        self, constraints: Sequence[ConstrainingProcessor], index: int, row: Tensor, count: int
    ) -> Tensor:
        forced = max((one.forced(index, row) for one in constraints), key=len)
        found = row.new_tensor(forced[:count]) if forced else self._continuation(row, count)
        for constraint in constraints:
            found = found[: constraint.accepted(index, row, found.tolist())]
        return found

    def _continuation(self, row: Tensor, count: int) -> Tensor:
        T = len(row)
        if count == 0:
            return row[:0]
        for n in range(min(self.ngram, T - 1), 0, -1):
            earlier = row[:-1].unfold(0, n, 1)  # (T - n, n)
            starts = (earlier == row[T - n :]).all(dim=1).nonzero()[:, 0] + n
            if len(starts):
                # The latest one that goes on for long enough, or else the longest.
                long = starts[starts + count <= T]
                start = int(long[-1] if len(long) else starts[0])
                return row[start : start + count]
        return row[:0]


class DraftWriter:
    """Writes a draft token by token, with the sampler of the text.

    A row's draft ends where no token is left, or where the scores are not numbers: what is drafted
    may make a text slower, but neither another one nor an error.

    Args:
        text: the rows so far.
        wanted: how many tokens each row is to have at the most.
        sampler: reshapes scores and takes tokens.
        threshold: a row's draft ends with a token that is less probable than that.
    """

    def __init__(
        self, text: TokenBuffer, wanted: Sequence[int], sampler: Sampler, threshold: float
    ) -> None:
        self.sampler = sampler
        self.threshold = threshold
        self.text = text.cut(len(text)) if sampler.processors else text
        self.tokens: list[Tensor] = []
        self._probabilities: list[Tensor] = []
        self._counts = list(wanted)

    @property
    def done(self) -> bool:
        """Whether every row's draft is complete."""
        return len(self.tokens) >= max(self._counts)

    def write(self, logits: Tensor) -> Tensor:
        """Append a token (B,) to every row's draft, from logits (B, V)."""
        agreement = self.sampler.agreement
        if agreement is None:
            token = self._choose(logits)
        else:
            token, counts = agreement.decided(lambda: self._chosen(logits), logits.device)
            self._counts = counts.tolist()
        self.tokens.append(token)
        if self.sampler.processors:
            self.text.append(token)
        return token

    def _chosen(self, logits: Tensor) -> Tensor:
        """Choose a token per row; return tokens and wanted counts, (2, B)."""
        token = self._choose(logits)
        return torch.stack((token, token.new_tensor(self._counts)))

    def _choose(self, logits: Tensor) -> Tensor:
        sampler = self.sampler
        needed = None
        if sampler.reads_unfinished:
            open_rows = [[count > len(self.tokens)] for count in self._counts]
            needed = torch.tensor(open_rows, device=logits.device, dtype=torch.bool)
        scores = sampler.scores_of_last(self.text, logits[:, None], needed)[:, 0]
        p = scores.softmax(dim=-1) if sampler.do_sample or self.threshold > 0 else None
        best, token = likeliest(scores)
        self._end_at(best.tolist())
        if p is not None and sampler.do_sample:
            writes = [count > len(self.tokens) for count in self._counts]
            token = sampler.draw(p, unfinished=torch.tensor(writes, dtype=torch.bool, device="cpu"))
            self._probabilities.append(p)
        if p is not None and self.threshold > 0:
            sure = (p.gather(1, token[:, None])[:, 0] >= self.threshold).tolist()
            most = len(self.tokens) + 1
            self._counts = [
                count if confident else min(count, most)
                for count, confident in zip(self._counts, sure, strict=True)
            ]
        return token

    def _end_at(self, best: list[float]) -> None:
        """End the drafts of rows whose largest score is not finite."""
        written = len(self.tokens)
        for row, score in enumerate(best):
            if self._counts[row] > written and not -math.inf < score < math.inf:
                self._counts[row] = written
                if score != -math.inf:
                    warnings.warn(
                        f"the scores of a draft hold {score}, so that row {row} gets none here; "
                        "the text is what the model makes alone (check what drafts, and its dtype)",
                        stacklevel=2,
                    )

    def draft(self) -> Draft:
        """Return the finished draft."""
        drawn = torch.stack(self._probabilities, dim=1) if self._probabilities else None
        return Draft(torch.stack(self.tokens, dim=1), self._counts, drawn)
