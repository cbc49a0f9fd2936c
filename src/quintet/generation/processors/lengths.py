"""Processors that depend on length: ends forbidden, forced, or made more likely."""

import torch
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.generation.processors.base import (
    LogitsProcessor,
    TokenIds,
    check_known,
    finite_float,
    forbid,
    largest,
    row_lengths,
    token_ids,
)

# A length is one number, or one for each row (B,).
Length = int | Tensor


class MinLengthLogitsProcessor(LogitsProcessor):
    """Forbids the end below `min_length` tokens, prompt included."""

    def __init__(
        self, min_length: Length, eos_token_id: TokenIds, device: str | torch.device = "cpu"
    ) -> None:
        self.min_length = _length("min_length", min_length)
        self.eos_token_id = token_ids("eos_token_id", eos_token_id).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        short = row_lengths(input_ids, padding) < self.min_length
        return forbid(scores, self.eos_token_id, short)


class MinNewTokensLengthLogitsProcessor(LogitsProcessor):
    """Forbids the end before `min_new_tokens` new tokens."""

    def __init__(
        self,
        prompt_length_to_skip: Length,
        min_new_tokens: int,
        eos_token_id: TokenIds,
        device: str | torch.device = "cpu",
    ) -> None:
        self.prompt_length_to_skip = _length("prompt_length_to_skip", prompt_length_to_skip)
        self.min_new_tokens = int(_length("min_new_tokens", min_new_tokens))
        self.eos_token_id = token_ids("eos_token_id", eos_token_id).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        new = row_lengths(input_ids, padding) - self.prompt_length_to_skip
        return forbid(scores, self.eos_token_id, new < self.min_new_tokens)


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """Makes `bos_token_id` the second token of a row."""

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id
        self._only = token_ids("forced_bos_token_id", bos_token_id)
        self._largest = largest(self._only)

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        check_known("forced_bos_token_id", self._largest, scores.shape[1])
        return _force(scores, self._only, row_lengths(input_ids, padding) == 1)


class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """Makes `eos_token_id` the last of `max_length` tokens."""

    def __init__(
        self, max_length: Length, eos_token_id: TokenIds, device: str | torch.device = "cpu"
    ) -> None:
        self.max_length = _length("max_length", max_length)
        self.eos_token_id = token_ids("forced_eos_token_id", eos_token_id).to(device)
        self._largest = largest(self.eos_token_id)

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        check_known("forced_eos_token_id", self._largest, scores.shape[1])
        last = row_lengths(input_ids, padding) == self.max_length - 1
        return _force(scores, self.eos_token_id, last)


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Raises the logit of the end by |logit|·(factorⁿ - 1), n tokens after a start.

    Args:
        exponential_decay_length_penalty: how many new tokens before it starts, and the factor.
        eos_token_id: the tokens that end a row.
        input_ids_seq_length: the length of the prompt.
    """

    def __init__(
        self,
        exponential_decay_length_penalty: tuple[int, float] | list[float],
        eos_token_id: TokenIds,
        input_ids_seq_length: Length,
    ) -> None:
        start, factor = exponential_decay_length_penalty
        self.regulation_start = int(start) + _length("input_ids_seq_length", input_ids_seq_length)
        self.regulation_factor = finite_float("the factor", factor)
        # Named twice, it would be raised twice.
        self.eos_token_id = torch.unique(token_ids("eos_token_id", eos_token_id))

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        exceeded = row_lengths(input_ids, padding) - self.regulation_start
        if isinstance(exceeded, int) and exceeded <= 0:
            return scores
        ends = self.eos_token_id.to(scores.device)
        n = (
            torch.as_tensor(exceeded, device=scores.device, dtype=torch.long)
            .clamp(min=0)
            .reshape(-1, 1)
        )
        raised = torch.pow(self.regulation_factor, n.double()) - 1
        logits = scores[:, ends]
        penalty = logits.abs() * raised.to(scores)
        return scores.index_add(1, ends, torch.where(logits.isfinite(), penalty, 0.0))


class SuppressTokensAtBeginLogitsProcessor(LogitsProcessor):
    """Forbids tokens at length `begin_index`, the prompt's."""

    def __init__(
        self,
        begin_suppress_tokens: TokenIds,
        begin_index: Length,
        device: str | torch.device = "cpu",
    ) -> None:
        self.begin_suppress_tokens = token_ids("begin_suppress_tokens", begin_suppress_tokens).to(
            device
        )
        self._largest = largest(self.begin_suppress_tokens)
        self.begin_index = begin_index

    def set_begin_index(self, begin_index: Length) -> None:
        """Set the length at which tokens are forbidden."""
        self.begin_index = begin_index

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        check_known("begin_suppress_tokens", self._largest, scores.shape[1])
        begins = row_lengths(input_ids, padding) == self.begin_index
        return forbid(scores, self.begin_suppress_tokens, begins)


def _length(name: str, value: Length) -> Length:
    if isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise InputError(f"{name}={shown(value)} has to be an integer of at least 0")
    return value


def _force(scores: Tensor, ids: Tensor, rows: bool | Tensor) -> Tensor:
    """Allow only the tokens `ids` (N,), in all rows, none, or those of (B,)."""
    if rows is False:
        return scores
    only = torch.full_like(scores, -torch.inf).index_fill_(1, ids.to(scores.device), 0.0)
    return only if rows is True else torch.where(rows[:, None], only, scores)
