"""Stopping criteria: lengths, end tokens, strings, time, or the caller's own."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.generation.processors.base import TokenIds, token_ids
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.options import is_text

__all__ = [
    "Criterion",
    "EosTokenCriteria",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "StopStringCriteria",
    "Stopping",
    "StoppingCriteria",
    "StoppingCriteriaList",
]

Scores = tuple[Tensor, ...] | None
# What takes (ids, scores) and returns (B,) True for rows that end, or one truth for all.
Criterion = Callable[..., Tensor | bool]


class StoppingCriteria:
    """Returns which rows end, (B,), given ids (B, T) and the scores of all steps."""

    def __call__(self, input_ids: Tensor, scores: Scores, **kwargs: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has to define __call__(ids, scores)")


class MaxLengthCriteria(StoppingCriteria):
    """Ends all rows at `max_length` columns."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings

    def __call__(self, input_ids: Tensor, scores: Scores, **kwargs: Any) -> Tensor:
        return _all(input_ids, input_ids.shape[1] >= self.max_length)


class MaxTimeCriteria(StoppingCriteria):
    """Ends all rows `max_time` seconds after a start, by default its creation."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Tensor, scores: Scores, **kwargs: Any) -> Tensor:
        return _all(input_ids, time.time() - self.initial_timestamp > self.max_time)


class EosTokenCriteria(StoppingCriteria):
    """Ends the rows whose last token is an end token."""

    def __init__(self, eos_token_id: TokenIds) -> None:
        self.eos_token_id = token_ids("eos_token_id", eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Scores, **kwargs: Any) -> Tensor:
        self.eos_token_id = self.eos_token_id.to(input_ids.device)
        return torch.isin(input_ids[:, -1], self.eos_token_id)


class StopStringCriteria(StoppingCriteria):
    """Ends the rows whose last token completes one of the strings.

    A string may begin in any token before it, also in the prompt, and need not end where the last
    token does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, stop_strings: str | Sequence[str]) -> None:
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not strings or not all(is_text(one) and one for one in strings):
            raise InputError(
                f"stop_strings={shown(stop_strings)} has to be texts, none of them empty"
            )
        self.tokenizer = tokenizer
        self.stop_strings = tuple(strings)
        # A token has a byte at least; and one more, as a text's first may lose a space.
        self._reach = max(len(one.encode()) for one in strings) + 1

    def __call__(
        self, input_ids: Tensor, scores: Scores, padding: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        tails = input_ids[:, -self._reach :].tolist()
        if padding is not None:
            lengths = (input_ids.shape[1] - padding).tolist()
            tails = [tail[-n:] for tail, n in zip(tails, lengths, strict=True)]
        return torch.tensor(
            [self._completes(tail) for tail in tails], device=input_ids.device, dtype=torch.bool
        )

    def _completes(self, ids: list[int]) -> bool:
        text = self._text(ids)
        if not any(one in text for one in self.stop_strings):
            return False
        # Half of a character is shown as one that is no part of the text yet.
        before = len(self._text(ids[:-1]).rstrip("\ufffd"))
        return any(text.find(one, max(before - len(one) + 1, 0)) >= 0 for one in self.stop_strings)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # type: ignore[no-any-return]


class StoppingCriteriaList(list[Any]):
    """A list of criteria; any one ends a row."""

    def __call__(
        self, input_ids: Tensor, scores: Scores, padding: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return a mask (B,) of ending rows; `padding` (B,) counts leading padding columns."""
        ended = _all(input_ids, False)
        for criterion in self:
            further = kwargs
            if isinstance(criterion, StopStringCriteria):
                further = {**kwargs, "padding": padding}
            ended = ended | criterion(input_ids, scores, **further)
        return ended

    @property
    def max_length(self) -> int | None:
        """The length of the first `MaxLengthCriteria`, None without one."""
        return next((c.max_length for c in self if isinstance(c, MaxLengthCriteria)), None)


class Stopping:
    """End tokens and criteria: everything that ends a row before its limit.

    Args:
        eos: the ids (N,) that end a row.
        criteria: all else that may.
    """

    def __init__(self, eos: Tensor, criteria: StoppingCriteriaList | None = None) -> None:
        self.eos = eos
        self.criteria = StoppingCriteriaList() if criteria is None else criteria

    def ends(self, tokens: Tensor) -> Tensor:
        """Return a mask of the end tokens."""
        # A comparison is five times as fast as a search.
        return tokens == self.eos if self.eos.numel() == 1 else torch.isin(tokens, self.eos)

    def __call__(self, ids: Tensor, scores: Scores, padding: Tensor | None = None) -> Tensor:
        """Return a mask (B,) of the rows (B, T) whose last token ends them."""
        ended = self.ends(ids[:, -1])
        return ended | self.criteria(ids, scores, padding) if self.criteria else ended

    def __bool__(self) -> bool:
        """Return whether anything can end a row."""
        return bool(self.criteria) or self.eos.numel() > 0


def _all(input_ids: Tensor, ended: bool) -> Tensor:
    return torch.full((input_ids.shape[0],), ended, device=input_ids.device, dtype=torch.bool)
