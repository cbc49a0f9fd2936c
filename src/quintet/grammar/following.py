"""A matcher that follows one growing text, and goes back on rejected drafts."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quintet.errors import GrammarError, InputError
from quintet.grammar.compiled import Compiled
from quintet.grammar.faults import clear_reason
from quintet.grammar.vocabulary import GrammarVocabulary

# A grammar that has to be compiled anew again before so many tokens is too complex.
LEAST = 16


class Following:
    """The state of a grammar in a text, updated from the ids.

    Args:
        compiled: the grammar.
        vocabulary: the tokens.
        after: the token behind which the grammar begins; None for the begin of the text.
    """

    def __init__(
        self, compiled: Compiled, vocabulary: GrammarVocabulary, after: int | None
    ) -> None:
        self._compiled, self._after = compiled, after
        self._matcher = compiled.begin()
        self._ends, self._size = frozenset(vocabulary.ends), vocabulary.size
        self._seen = torch.empty(0, dtype=torch.long, device="cpu")
        self._length = 0
        # How long the prompt is, and where the grammar begins; None until that is known.
        self._prompt: int | None = None
        self._start: int | None = None
        # Where the text ended, or left the grammar: its token there was not followed.
        self._stop: int | None = None
        self._ended = False
        # Where the grammar was compiled anew last.
        self._anew: int | None = None

    def fill(self, ids: Tensor, words: NDArray[np.int32]) -> None:
        """Write the mask of tokens that may follow a text (T,), a bit each.

        Raises:
            GrammarError: the grammar has become too complex.
            InputError: it is another text.
        """
        self._follow(ids)
        octets = words.view(np.uint8)
        if self._start is None:
            words[:] = -1
            for end in self._ends:
                octets[end >> 3] &= ~(1 << (end & 7)) & 255
        elif self._stop is not None:
            words[:] = 0
            for end in self._ends if self._ended else ():
                octets[end >> 3] |= 1 << (end & 7)
        else:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if self._matcher.is_error():
                self._begin_anew()
                self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
                self._check()

    def accepted(self, ids: Tensor, tokens: list[int]) -> int:
        """Return the number of tokens, of those given, that may follow a text (T,).

        Tokens behind the one that begins the grammar, or ends the text, do not count.
        """
        self._follow(ids)
        if self._stop is not None:
            return 0
        known = next((n for n, token in enumerate(tokens) if token >= self._size), len(tokens))
        end = next((n for n in range(known) if tokens[n] in self._ends), known)
        if self._start is None:
            return next((n + 1 for n in range(end) if tokens[n] == self._after), end)
        count = self._matcher.validate_tokens(tokens[:end])
        if self._matcher.is_error():
            self._begin_anew()
            return 0
        return count + (count == end < known)

    def forced(self, ids: Tensor) -> list[int]:
        """Return the tokens that must follow a text (T,)."""
        self._follow(ids)
        if self._start is None or self._stop is not None:
            return []
        return self._matcher.compute_ff_tokens()

    def _follow(self, ids: Tensor) -> None:
        ids = ids.cpu()
        if self._prompt is None:
            self._keep(ids, 0)
            self._length = self._prompt = len(ids)
            self._start = self._prompt if self._after is None else None
        common = self._common(ids)
        if common < self._prompt:
            raise InputError(
                "a grammar follows one text, and this is another one; use a copy() of it"
            )
        self._take_back(common)
        self._keep(ids, common)
        for token in ids[common:].tolist():
            self._take(token)
            self._length += 1

    def _common(self, ids: Tensor) -> int:
        """Return the length of the unchanged prefix."""
        both = min(self._length, len(ids))
        if torch.equal(self._seen[:both], ids[:both]):
            return both
        return int((self._seen[:both] != ids[:both]).nonzero()[0])

    def _take_back(self, length: int) -> None:
        start, stop = self._start, self._stop
        if start is not None:
            followed = (self._length if stop is None else stop) - start
            stays = max((length if stop is None else min(length, stop)) - start, 0)
            if followed > stays:
                self._matcher.rollback(followed - stays)
                self._check()
            if self._after is not None and length < start:
                self._start = None
        if stop is not None and length <= stop:
            self._stop, self._ended = None, False
        self._length = length

    def _keep(self, ids: Tensor, common: int) -> None:
        if len(ids) > len(self._seen):
            room = self._seen.new_zeros(len(ids) + 256)
            room[:common] = self._seen[:common]
            self._seen = room
        self._seen[common : len(ids)] = ids[common:]

    def _take(self, token: int) -> None:
        if self._stop is not None:
            return
        if self._start is None:
            if token == self._after:
                self._start = self._length + 1
        elif token in self._ends:
            self._stop, self._ended = self._length, self._matcher.is_accepting()
        elif token < self._size and self._consumed(token):
            self._compiled.followed += 1
        else:
            self._stop = self._length

    def _consumed(self, token: int) -> bool:
        """Consume a token; return whether the grammar allows it."""
        if self._matcher.validate_tokens([token]) and self._matcher.consume_token(token):
            return True
        if not self._matcher.is_error():
            return False
        self._begin_anew()
        went = bool(self._matcher.validate_tokens([token])) and self._matcher.consume_token(token)
        self._check()
        return went

    def _begin_anew(self) -> None:
        """Restart with a fresh lexer, and follow the text from its start.

        Raises:
            GrammarError: that was done just before.
        """
        assert self._start is not None
        if self._anew is not None and self._length < self._anew + LEAST:
            self._check()
        self._anew = self._length
        self._matcher = self._compiled.begin_anew()
        self._matcher.consume_tokens(self._seen[self._start : self._length].tolist())
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                f"the grammar cannot be followed further: {clear_reason(self._matcher.get_error())}"
            )
