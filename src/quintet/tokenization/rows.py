"""One encoded text: a window of the pipeline's output, with padding."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from tokenizers import Encoding


class TokenizedRow:
    """The columns of one row of a batch.

    A view: the pipeline's own encoding stays whole, so that nothing has to be switched on and
    off inside a tokenizer that other threads may be using.
    """

    def __init__(
        self,
        encoding: Encoding,
        indices: Sequence[int] | None = None,
        *,
        pad: tuple[int, int] = (0, 0),
        pad_id: int = 0,
        pad_token: str = "",
        renamed: Mapping[int, tuple[int, str]] | None = None,
        places: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._encoding = encoding
        self._indices = indices
        self._pad = pad
        self._pad_id = pad_id
        self._pad_token = pad_token
        self._renamed = renamed
        # Where what was encoded, and the text it stands for, go apart: a place in both.
        self._places = places

    def __len__(self) -> int:
        count = len(self._encoding) if self._indices is None else len(self._indices)
        return count + sum(self._pad)

    def _column(self, values: list[Any], padding: Any) -> list[Any]:
        if self._indices is not None:
            values = [values[position] for position in self._indices]
        left, right = self._pad
        return [padding] * left + values + [padding] * right if left or right else values

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        ids = self._encoding.ids
        if self._renamed is not None:
            renamed = self._renamed
            ids = [renamed[index][0] if index in renamed else index for index in ids]
        return self._column(ids, self._pad_id)

    @property
    def tokens(self) -> list[str]:
        """The tokens as the vocabulary spells them."""
        tokens = self._encoding.tokens
        if self._renamed is not None:
            for place, index in enumerate(self._encoding.ids):
                if index in self._renamed:
                    tokens[place] = self._renamed[index][1]
        return self._column(tokens, self._pad_token)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """The start and end of each token in its text, in characters."""
        offsets = self._encoding.offsets
        if self._places:
            offsets = [(self._place(start), self._place(end)) for start, end in offsets]
        return self._column(offsets, (0, 0))

    def _place(self, character: int) -> int:
        index = bisect_right(self._places, character, key=itemgetter(0)) - 1
        encoded, own = self._places[index] if index >= 0 else (0, 0)
        return own + character - encoded

    @property
    def type_ids(self) -> list[int]:
        """The segment of each token."""
        return self._column(self._encoding.type_ids, 0)

    @property
    def attention_mask(self) -> list[int]:
        """1 for tokens, 0 for padding."""
        return self._column([1] * len(self._encoding), 0)

    @property
    def special_tokens_mask(self) -> list[int]:
        """1 for the tokens the pipeline added around the text, 0 for the text's."""
        return self._column(self._encoding.special_tokens_mask, 1)

    @property
    def word_ids(self) -> list[int | None]:
        """The word each token belongs to; None for added tokens."""
        return self._column(self._encoding.word_ids, None)

    @property
    def sequence_ids(self) -> list[int | None]:
        """0 for tokens of the text, 1 for those of its pair, None for added tokens."""
        return self._column(self._encoding.sequence_ids, None)

    def windows(self, text: list[range], pair: list[range]) -> "list[TokenizedRow]":
        """Return a row for each combination of windows of text and pair.

        The ranges count the tokens of each sequence from 0; tokens the pipeline added stay.
        """
        sequence_ids = self._encoding.sequence_ids
        added = self._encoding.special_tokens_mask
        numbered: list[tuple[int, int] | None] = []
        seen = [0, 0]
        for sequence, special in zip(sequence_ids, added, strict=True):
            if special or sequence is None:
                numbered.append(None)
            else:
                numbered.append((sequence, seen[sequence]))
                seen[sequence] += 1
        return [
            TokenizedRow(
                self._encoding,
                [
                    position
                    for position, place in enumerate(numbered)
                    if place is None or place[1] in (first, second)[place[0]]
                ],
                renamed=self._renamed,
                places=self._places,
            )
            for first in text
            for second in pair
        ]

    def sequence_lengths(self) -> tuple[int, int]:
        """Return the number of tokens of text and pair."""
        counts = [0, 0]
        pairs = zip(self._encoding.sequence_ids, self._encoding.special_tokens_mask, strict=True)
        for sequence, special in pairs:
            if sequence is not None and not special:
                counts[sequence] += 1
        return counts[0], counts[1]

    def padded(self, left: int, right: int, *, pad_id: int, pad_token: str) -> "TokenizedRow":
        """Return the padded row."""
        return TokenizedRow(
            self._encoding,
            self._indices,
            pad=(left, right),
            pad_id=pad_id,
            pad_token=pad_token,
            renamed=self._renamed,
            places=self._places,
        )
