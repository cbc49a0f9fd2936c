"""Verification of a draft: which tokens are accepted, and the token after them."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.generation.sampler import Sampler
from quintet.generation.speculative.candidates import Draft
from quintet.generation.token_buffer import TokenBuffer
from quintet.ops.sampling import NothingLeftError, likeliest
from quintet.ops.speculative import keep_likeliest, keep_sampled


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of verifying drafts.

    Attributes:
        tokens: of each row, what holds of its draft and the token behind it.
        accepted: how many of each row's draft hold.
        scores: (B, K + 1, V) that they were taken by.
        best: the largest of them, of each row and place.
    """

    tokens: list[list[int]]
    accepted: list[int]
    scores: Tensor
    best: list[list[float]]

    def check_left(self, counts: Sequence[int], before: Sequence[int]) -> None:
        """Check that each of a row's first `counts` places had an allowed token.

        Args:
            counts: how many tokens each row takes.
            before: how many it has got already, for the message.

        Raises:
            NothingLeftError: there was none.
        """
        for row, count in enumerate(counts):
            for place, score in enumerate(self.best[row][:count]):
                if not -math.inf < score < math.inf:
                    raise NothingLeftError(row, score, before[row] + place + 1)


def check_draft(
    sampler: Sampler, text: TokenBuffer, logits: Tensor, draft: Draft, unfinished: Sequence[bool]
) -> Checked:
    """Verify a draft: the number of accepted tokens, and the next token.

    Args:
        sampler: takes the tokens, for this turn.
        text: the rows with their drafts.
        logits: (B, K + 1, V) of the tokens from the first drafted one on.
        draft: K tokens of each row.
        unfinished: which rows need a token.
    """
    K, B = draft.tokens.shape[1], len(logits)
    scores = sampler.scores_of_last(text, logits, _needed(sampler, draft, unfinished))
    drafted = draft.tokens.tolist()
    if sampler.do_sample:
        p = scores.softmax(dim=-1)
        # The first number is what is always needed: the others are as many as the others draft.
        u = sampler.uniform(B, K + 1, p.device)
        accepted, rest = keep_sampled(p, draft.probabilities, draft.tokens, draft.counts, u[:, 1:])
        # Whether there is something to draw is asked later, of the tokens that are needed.
        none = torch.zeros(B, dtype=torch.bool, device="cpu")
        bonus = sampler.draw(rest, u[:, :1], none).tolist()
        best = scores.amax(dim=-1)
    else:
        best, chosen = likeliest(scores)
        own = chosen.tolist()
        accepted = keep_likeliest(own, drafted, draft.counts)
        bonus = [row[count] for row, count in zip(own, accepted, strict=True)]
    tokens = [[*drafted[row][: accepted[row]], bonus[row]] for row in range(B)]
    return Checked(tokens, accepted, scores, best.tolist())


def for_a_turn(sampler: Sampler, unfinished: Sequence[bool]) -> Sampler:
    """Return the sampler with fresh generators for one draft or check, seeded by the rows'.

    However much a turn draws for a row, because of the others, the next one is the same.
    """
    if sampler.generators is None or not sampler.do_sample:
        return sampler
    seeded = copy.copy(sampler)
    seeded.generators = [
        torch.Generator(g.device).manual_seed(
            int(torch.randint(2**63 - 1, (1,), device=g.device, generator=g, dtype=torch.long))
            if active
            else 0
        )
        for g, active in zip(sampler.generators, unfinished, strict=True)
    ]
    return seeded


def _needed(sampler: Sampler, draft: Draft, unfinished: Sequence[bool]) -> Tensor | None:
    """Return a mask (B, K + 1) of the scores that may be needed, or None if no processor asks."""
    if not sampler.reads_unfinished:
        return None
    device = draft.tokens.device
    most = [count if active else -1 for count, active in zip(draft.counts, unfinished, strict=True)]
    places = torch.arange(draft.tokens.shape[1] + 1, device=device, dtype=torch.long)
    return places <= torch.tensor(most, device=device, dtype=torch.long)[:, None]
