"""The logits processor of constrained decoding."""

import time
from typing import Self

import numpy as np
import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.generation.processors.base import ConstrainingProcessor
from quintet.grammar.compiled import Compiled
from quintet.grammar.following import Following
from quintet.grammar.vocabulary import GrammarVocabulary


class GrammarProcessor(ConstrainingProcessor):
    """Allows only the next tokens of a grammar, per row.

    The text begins where the row ended when it was seen first. It belongs to the rows of one
    generation; `copy()` makes one for others.

    Args:
        compiled: the grammar.
        vocabulary: the tokens.
        after: the token behind which the grammar begins; None for the begin of the text.

    Attributes:
        rows: what follows each row, since they were seen first.
        words: a bit for each token of each row, as of the last call.
        masks: how many masks it made.
        seconds: how long that took.
    """

    def __init__(
        self, compiled: Compiled, vocabulary: GrammarVocabulary, after: int | None = None
    ) -> None:
        self._compiled, self._vocabulary, self._after = compiled, vocabulary, after
        self.rows: list[Following] = []
        self.masks, self.seconds = 0, 0.0
        self.words = np.zeros((0, 0), dtype=np.int32)

    def copy(self) -> Self:
        """Return a processor for another generation."""
        return type(self)(self._compiled, self._vocabulary, self._after)

    def __call__(
        self,
        input_ids: Tensor,
        scores: Tensor,
        padding: Tensor | None = None,
        unfinished: Tensor | None = None,
    ) -> Tensor:
        begins = None if padding is None else padding.tolist()
        needed = None if unfinished is None else unfinished.tolist()
        began = time.perf_counter()
        for row, ids in enumerate(input_ids):
            if needed is not None and not needed[row]:
                continue
            own = ids if begins is None else ids[begins[row] :]
            self._row(row, len(scores)).fill(own, self.words[row])
            self.masks += 1
        self.seconds += time.perf_counter() - began
        size = min(self._vocabulary.size, scores.shape[1])
        octets = self.words.view(np.uint8)
        bits = np.unpackbits(octets, axis=1, count=size, bitorder="little")
        allowed = torch.from_numpy(bits).view(torch.bool).to(scores.device)
        if unfinished is not None:
            allowed = allowed | ~unfinished[:, None]
        never = scores.new_tensor(-torch.inf)
        if size == scores.shape[1]:
            return torch.where(allowed, scores, never)
        # What pads the embeddings is no token.
        result = torch.full_like(scores, -torch.inf)
        result[:, :size] = torch.where(allowed, scores[:, :size], never)
        return result

    def accepted(self, row: int, ids: Tensor, tokens: list[int]) -> int:
        """Return the number of tokens, of those given, that may follow a row."""
        return self._row(row, len(self.rows)).accepted(ids, tokens)

    def forced(self, row: int, ids: Tensor) -> list[int]:
        """Return the tokens that must follow a row."""
        return self._row(row, len(self.rows)).forced(ids)

    def _row(self, row: int, count: int) -> Following:
        if len(self.rows) != count:
            if self.rows:
                raise InputError(
                    f"a grammar follows the {len(self.rows)} rows that it was made for, and now "
                    f"there are {count}; use a copy() of it for another generation"
                )
            self.words = np.zeros((count, self._vocabulary.words), dtype=np.int32)
            self.rows = [
                Following(self._compiled, self._vocabulary, self._after) for _ in range(count)
            ]
        return self.rows[row]
