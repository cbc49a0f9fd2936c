"""The drafts of one sequence, from being asked for to being checked."""

import torch
from torch import Tensor

from quintet.generation.outputs import Speculation
from quintet.generation.sampler import Sampler
from quintet.generation.speculative.candidates import Draft, Drafter, Schedule
from quintet.generation.speculative.checking import Checked, check_draft, for_a_turn
from quintet.generation.token_buffer import TokenBuffer

__all__ = ["Drafting"]


class Drafting:
    """Drafts for a single row; what is drafted waits until a forward has run over it.

    Args:
        drafter: where drafts come from; it has to need nothing but the text.
        schedule: how many tokens to draft.

    Attributes:
        found: how it went so far.
    """

    def __init__(self, drafter: Drafter, schedule: Schedule) -> None:
        self.drafter, self.schedule = drafter, schedule
        self.found = Speculation()
        self._draft: Draft | None = None
        schedule.start(1)

    def propose(
        self, text: TokenBuffer, sampler: Sampler, room: int, ends: frozenset[int]
    ) -> list[int]:
        """Return tokens that may follow a text with room for so many, as before if unchecked."""
        if self._draft is None:
            most = max(0, min(self.schedule.rows[0], room - 1))
            turn = for_a_turn(sampler, [True])
            draft = Draft.none(text)
            if most:
                draft = self.drafter.propose(text, [most], [True], turn)
            tokens = draft.tokens[0, : draft.counts[0]].tolist()
            # Behind an end, nothing is ever needed.
            end = next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))
            drawn = None if draft.probabilities is None else draft.probabilities[:, :end]
            self._draft = Draft(draft.tokens[:, :end], [end], drawn if end else None)
        return self._draft.tokens[0].tolist()

    def check(self, text: TokenBuffer, sampler: Sampler, logits: Tensor) -> Checked:
        """Tell what holds of what was drafted behind a text, by logits (K + 1, V)."""
        draft = self._draft or Draft.none(text)
        drafted = text
        if draft.counts[0]:
            drafted = TokenBuffer(torch.cat((text.ids, draft.tokens), dim=1))
        return check_draft(for_a_turn(sampler, [True]), drafted, logits[None], draft, [True])

    def taken(self, count: int, kept: int) -> None:
        """Take note of how many tokens were taken, and of how many drafts held."""
        drafted = 0 if self._draft is None else self._draft.counts[0]
        self._draft = None
        if drafted:
            self.schedule.learn([drafted], [kept])
            self.found.accepted.append([(drafted, min(kept, count))])
        self.drafter.accepted([count])
