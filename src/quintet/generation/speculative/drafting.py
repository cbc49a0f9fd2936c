"""Drafts for one sequence of an engine."""

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from quintet.generation.outputs import Speculation
from quintet.generation.sampler import Sampler
from quintet.generation.speculative.candidates import Draft, Drafter, DraftSchedule, DraftWriter
from quintet.generation.speculative.checking import Checked, check_draft, for_a_turn
from quintet.generation.speculative.pacing import Pacing
from quintet.generation.speculative.prediction import Seen
from quintet.generation.token_buffer import TokenBuffer


class Drafting(ABC):
    """Drafts for one row; a draft waits until a forward has verified it.

    Args:
        schedule: how many tokens to draft.

    Attributes:
        found: how it went so far.
        pacing: decides when it drafts; None for always.
    """

    def __init__(self, schedule: DraftSchedule) -> None:
        self.schedule = schedule
        self.pacing: Pacing | None = None
        self.found = Speculation()
        self._draft: Draft | None = None
        schedule.start(1)

    @property
    def awake(self) -> bool:
        """Whether to draft now."""
        return self._draft is not None or self.pacing is None or self.pacing.awake

    @property
    def drafted(self) -> bool:
        """Whether a draft may be waiting for verification."""
        return self._draft is not None and self._draft.counts[0] > 0

    def propose(
        self, text: TokenBuffer, sampler: Sampler, limit: int, ends: frozenset[int]
    ) -> list[int]:
        """Return a draft of at most `limit` tokens; an unverified one is returned again."""
        if self._draft is None:
            draft = self._write(text, sampler, limit)
            tokens = draft.tokens[0, : draft.counts[0]].tolist()
            # Behind an end, nothing is ever needed.
            end = next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))
            drawn = None if draft.probabilities is None else draft.probabilities[:, :end]
            self._draft = Draft(draft.tokens[:, :end], [end], drawn if end else None)
        return self._draft.tokens[0].tolist()

    @abstractmethod
    def _write(self, text: TokenBuffer, sampler: Sampler, limit: int) -> Draft:
        """Write a draft of at most `limit` tokens."""

    def check(self, text: TokenBuffer, sampler: Sampler, logits: Tensor) -> Checked:
        """Verify the draft with logits (K + 1, V)."""
        draft = self._draft or Draft.none(text)
        drafted = text
        if draft.counts[0]:
            drafted = TokenBuffer(torch.cat((text.ids, draft.tokens), dim=1))
        return check_draft(for_a_turn(sampler, [True]), drafted, logits[None], draft, [True])

    def taken(self, count: int, accepted: int) -> None:
        """Learn the number of new tokens, and of accepted drafts."""
        drafted = 0 if self._draft is None else self._draft.counts[0]
        self._draft = None
        if self.pacing is not None:
            self.pacing.learn(count, drafted, accepted)
        if drafted:
            self.schedule.learn([drafted], [accepted])
            self.found.accepted.append([(drafted, min(accepted, count))])

    def _most(self, limit: int) -> int:
        most = min(self.schedule.rows[0], limit - 1)
        if self.pacing is not None:
            most = min(most, self.pacing.limit if self.pacing.awake else 0)
        return max(0, most)


class TextDrafting(Drafting):
    """Drafts that need only the text.

    Args:
        drafter: where drafts come from.
        schedule: how many tokens to draft.
    """

    def __init__(self, drafter: Drafter, schedule: DraftSchedule) -> None:
        super().__init__(schedule)
        self.drafter = drafter

    def _write(self, text: TokenBuffer, sampler: Sampler, limit: int) -> Draft:
        most = self._most(limit)
        turn = for_a_turn(sampler, [True])
        return self.drafter.propose(text, [most], [True], turn) if most else Draft.none(text)

    def taken(self, count: int, accepted: int) -> None:
        """Learn the number of new tokens, and of accepted drafts."""
        super().taken(count, accepted)
        self.drafter.accepted([count])


class PredictedDrafting(Drafting):
    """Drafts by prediction layers, run for many sequences at once.

    Args:
        schedule: how many tokens to draft.
        threshold: a draft ends with a token that is less probable than that.
    """

    def __init__(self, schedule: DraftSchedule, threshold: float) -> None:
        super().__init__(schedule)
        self._threshold = threshold
        self._unread: list[Seen] = []
        # Of the last forward, of which a check tells how much stays.
        self._unchecked: tuple[Seen, int] | None = None
        self._turn: Sampler | None = None
        self._writer: DraftWriter | None = None

    def saw(self, seen: Seen, keep: int) -> None:
        """Store the states of a forward; its last `keep` tokens are to be verified."""
        if keep:
            self._unchecked = seen, keep
        else:
            self._unread.append(seen)

    def unread(self) -> Seen | None:
        """Return the states that the layers have not read."""
        return Seen.joined(self._unread) if self._unread else None

    def has_read(self, again: Seen) -> None:
        """Mark all states as read, and set those to be read again."""
        self._unread = [again] if len(again) else []

    def forget(self) -> None:
        """Mark that the layers hold nothing of the text."""
        self._unread, self._unchecked = [], None

    def begin(self, text: TokenBuffer, sampler: Sampler, limit: int) -> DraftWriter | None:
        """Return a writer of the next draft, or None if none is needed."""
        most = self._most(limit)
        if self._draft is not None or not most or not self._unread:
            return None
        self._turn = self._turn or for_a_turn(sampler, [True])
        # A run that fails is done again, by the same numbers.
        turn = copy.copy(self._turn)
        if turn.do_sample and turn.generators is not None:
            turn.generators = [generator.clone_state() for generator in turn.generators]
        self._writer = DraftWriter(text, [most], turn, self._threshold)
        return self._writer

    def _write(self, text: TokenBuffer, sampler: Sampler, limit: int) -> Draft:
        # Also where nothing is drafted, so that what follows does not depend on that.
        self._turn = self._turn or for_a_turn(sampler, [True])
        return Draft.none(text) if self._writer is None else self._writer.draft()

    def taken(self, count: int, accepted: int) -> None:
        """Learn the number of new tokens, and of accepted drafts."""
        super().taken(count, accepted)
        self._turn = self._writer = None
        if self._unchecked is not None:
            seen, keep = self._unchecked
            self._unread.append(seen.first(len(seen) - keep + count))
            self._unchecked = None
