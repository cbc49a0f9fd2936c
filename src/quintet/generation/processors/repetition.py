"""Processors that penalise or forbid tokens that occurred."""

import torch
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.generation.processors.base import LogitsProcessor, finite_float, positive_float
from quintet.ops.sampling import penalise_frequency, penalise_presence, penalise_repetition


class _Counting(LogitsProcessor):
    """Counts tokens after the first `prompt_ignore_length` of each row, an int or (B,)."""

    def __init__(self, prompt_ignore_length: int | Tensor | None) -> None:
        fits = prompt_ignore_length is None or (
            prompt_ignore_length.ndim == 1
            if isinstance(prompt_ignore_length, Tensor)
            else prompt_ignore_length >= 0
        )
        if not fits:
            raise InputError(
                f"prompt_ignore_length={shown(prompt_ignore_length)} has to be an integer of at "
                "least 0, or a tensor of one for each row"
            )
        self.prompt_ignore_length = prompt_ignore_length

    def _counted(self, input_ids: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return ids and, if rows differ, a mask of those that count."""
        begin: int | Tensor = 0 if padding is None else padding
        if self.prompt_ignore_length is not None:
            begin = begin + self.prompt_ignore_length
        if isinstance(begin, int):
            return input_ids[:, begin:], None
        columns = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.long)
        return input_ids, columns >= begin.to(input_ids.device)[:, None]


class RepetitionPenaltyLogitsProcessor(_Counting):
    """Divides logits of tokens that occurred, multiplies those below 0 (arXiv:1909.05858, §4.1)."""

    def __init__(self, penalty: float, prompt_ignore_length: int | Tensor | None = None) -> None:
        super().__init__(prompt_ignore_length)
        self.penalty = positive_float("repetition_penalty", penalty)

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        return penalise_repetition(scores, *self._counted(input_ids, padding), self.penalty)


class PresencePenaltyLogitsProcessor(_Counting):
    """Lowers the logit of every token that occurred by `penalty`."""

    def __init__(self, penalty: float, prompt_ignore_length: int | Tensor | None = None) -> None:
        super().__init__(prompt_ignore_length)
        self.penalty = finite_float("penalty", penalty)

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        return penalise_presence(scores, *self._counted(input_ids, padding), self.penalty)


class FrequencyPenaltyLogitsProcessor(_Counting):
    """Lowers the logit of a token by `penalty` for each time that it occurred."""

    def __init__(self, penalty: float, prompt_ignore_length: int | Tensor | None = None) -> None:
        super().__init__(prompt_ignore_length)
        self.penalty = finite_float("penalty", penalty)

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        return penalise_frequency(scores, *self._counted(input_ids, padding), self.penalty)


class EncoderRepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Makes tokens of the prompt more likely, for `penalty` above 1.

    Args:
        penalty: what their logits are multiplied by, those below 0 divided.
        encoder_input_ids: the prompt, (B, T); each row is that of B' / B rows of scores (B', V).
        padding: (B,) how many leading columns of each row are no text.
    """

    def __init__(
        self, penalty: float, encoder_input_ids: Tensor, *, padding: Tensor | None = None
    ) -> None:
        self.penalty = 1 / positive_float("encoder_repetition_penalty", penalty)
        self.encoder_input_ids = encoder_input_ids
        columns = torch.arange(
            encoder_input_ids.shape[1], device=encoder_input_ids.device, dtype=torch.long
        )
        self.real = None if padding is None else columns >= padding[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        copies = scores.shape[0] // self.encoder_input_ids.shape[0]
        ids = self.encoder_input_ids.repeat_interleave(copies, dim=0).to(scores.device)
        real = None
        if self.real is not None:
            real = self.real.repeat_interleave(copies, dim=0).to(scores.device)
        return penalise_repetition(scores, ids, real, self.penalty)


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbids tokens that would repeat an n-gram of the text."""

    def __init__(self, ngram_size: int) -> None:
        self.ngram_size = _size("no_repeat_ngram_size", ngram_size)

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        return _forbid_ends(input_ids, padding, input_ids, padding, self.ngram_size, scores)


class EncoderNoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbids tokens that would repeat an n-gram of the prompt.

    Args:
        encoder_ngram_size: n.
        encoder_input_ids: the prompt, (B, T); each row is that of B' / B rows of scores (B', V).
        padding: (B,) how many leading columns of each row are no text.
    """

    def __init__(
        self,
        encoder_ngram_size: int,
        encoder_input_ids: Tensor,
        *,
        padding: Tensor | None = None,
    ) -> None:
        self.ngram_size = _size("encoder_no_repeat_ngram_size", encoder_ngram_size)
        ids = encoder_input_ids
        self.encoder_input_ids = ids[None] if ids.ndim == 1 else ids
        self.padding = padding

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        copies = scores.shape[0] // self.encoder_input_ids.shape[0]
        source = self.encoder_input_ids.repeat_interleave(copies, dim=0)
        begin = None if self.padding is None else self.padding.repeat_interleave(copies)
        return _forbid_ends(source, begin, input_ids, padding, self.ngram_size, scores)


def _forbid_ends(
    source: Tensor,
    source_padding: Tensor | None,
    input_ids: Tensor,
    padding: Tensor | None,
    n: int,
    scores: Tensor,
) -> Tensor:
    """Forbid the last token of each n-gram of `source` that continues the text."""
    T = input_ids.shape[1]
    if n - 1 > T or n > source.shape[1]:
        return scores
    begin = input_ids[:, T - (n - 1) :]
    windows = source.unfold(1, n, 1)
    matches = (windows[..., :-1] == begin[:, None]).all(dim=-1)
    if source_padding is not None:
        columns = torch.arange(windows.shape[1], device=source.device, dtype=torch.long)
        matches &= columns >= source_padding[:, None]
    if padding is not None:
        matches &= (T - padding >= n - 1)[:, None]
    V = scores.shape[1]
    # What does not match goes into a column of its own, behind the vocabulary.
    ends = torch.where(matches, windows[..., -1].clamp(max=V), V)
    banned = torch.zeros(scores.shape[0], V + 1, dtype=torch.bool, device=scores.device)
    banned.scatter_(1, ends, True)
    return scores.masked_fill(banned[:, :V], -torch.inf)


def _size(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}={shown(value)} has to be an integer of at least 1")
    return value
