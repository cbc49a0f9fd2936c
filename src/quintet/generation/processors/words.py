"""Processors that favour or forbid given tokens and sequences."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quintet.errors import InputError, shown
from quintet.generation.processors.base import (
    LogitsProcessor,
    TokenIds,
    check_known,
    forbid,
    largest,
    token_ids,
)
from quintet.generation.sequence_bias import Biases, read_biases
from quintet.ops.sending import brought

# The row of the batch and its ids so far -> the ids that may come next.
PrefixAllowedTokens = Callable[[int, Tensor], Sequence[int]]


class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Forbids tokens."""

    def __init__(self, suppress_tokens: TokenIds, device: str | torch.device = "cpu") -> None:
        self.suppress_tokens = token_ids("suppress_tokens", suppress_tokens).to(device)
        self._largest = largest(self.suppress_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_known("suppress_tokens", self._largest, scores.shape[1])
        return forbid(scores, self.suppress_tokens)


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Adds a bias to the token that would complete a sequence.

    Args:
        sequence_bias: the bias of each sequence, `{(10, 45): -2.0}` or `[[[10, 45], -2.0]]`.
    """

    _name = "sequence_bias"

    def __init__(self, sequence_bias: Biases) -> None:
        self.sequence_bias = read_biases(sequence_bias, self._name)
        self._largest = max((max(ids) for ids in self.sequence_bias), default=0)
        # Sequences of one length are compared with the ends of all rows at once.
        groups: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for ids, bias in self.sequence_bias.items():
            groups.setdefault(len(ids), []).append((ids, bias))
        self._groups = [
            (
                torch.tensor([ids for ids, _ in group], dtype=torch.long, device="cpu"),
                torch.tensor([bias for _, bias in group], dtype=torch.float64, device="cpu"),
            )
            for group in groups.values()
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor, padding: Tensor | None = None) -> Tensor:
        T = input_ids.shape[1]
        check_known(self._name, self._largest, scores.shape[1])
        total = torch.zeros_like(scores)
        for ids, bias in self._groups:
            ids = brought(ids, scores.device)
            bias = brought(bias.to(scores.dtype), scores.device)
            begin = ids.shape[1] - 1
            if begin > T:
                continue
            matches = (input_ids[:, None, T - begin :] == ids[:, :-1]).all(dim=-1)
            if padding is not None:
                matches &= (T - padding >= begin)[:, None]
            total.index_add_(1, ids[:, -1], torch.where(matches, bias, 0.0))
        return scores + total


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Forbids tokens that would complete one of the sequences `bad_words_ids`.

    An end token alone is no bad word.
    """

    _name = "bad_words_ids"

    def __init__(
        self, bad_words_ids: list[list[int]], eos_token_id: TokenIds | None = None
    ) -> None:
        self.bad_word_ids = bad_words_ids
        lists = isinstance(bad_words_ids, list) and all(isinstance(x, list) for x in bad_words_ids)
        if not lists or not bad_words_ids:
            raise InputError(
                f"bad_words_ids={shown(bad_words_ids)} has to be a list of lists of token ids"
            )
        ends = [] if eos_token_id is None else token_ids("eos_token_id", eos_token_id).tolist()
        super().__init__(
            [[ids, -torch.inf] for ids in bad_words_ids if ids not in [[end] for end in ends]]
        )


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Allows only the tokens that a function of row index and ids returns.

    Args:
        prefix_allowed_tokens_fn: the function; it is not asked about rows that have ended.
        num_beams: how many rows belong to one prompt.
        padding: (B,) how many leading columns of each prompt are no text, as its caller gave it:
            those that are added in front later are not shown to the function.
    """

    def __init__(
        self,
        prefix_allowed_tokens_fn: PrefixAllowedTokens,
        num_beams: int,
        *,
        padding: Tensor | None = None,
    ) -> None:
        self.prefix_allowed_tokens_fn = prefix_allowed_tokens_fn
        self.num_beams = num_beams
        self.padding = padding

    def __call__(
        self,
        input_ids: Tensor,
        scores: Tensor,
        padding: Tensor | None = None,
        unfinished: Tensor | None = None,
    ) -> Tensor:
        mask = torch.full_like(scores, -torch.inf)
        begins = self._begins(len(scores), padding)
        needed = [True] * len(scores) if unfinished is None else unfinished.tolist()
        for row, ids in enumerate(input_ids):
            if not needed[row]:
                continue
            prompt, ids = row // self.num_beams, ids[begins[row] :]
            allowed = token_ids(
                "prefix_allowed_tokens_fn()", self.prefix_allowed_tokens_fn(prompt, ids)
            )
            if not len(allowed):
                raise InputError(
                    f"prefix_allowed_tokens_fn allows no token for row {prompt} behind "
                    f"{ids[-8:].tolist()}; it has to name at least one"
                )
            check_known("prefix_allowed_tokens_fn()", largest(allowed), scores.shape[1])
            mask[row, allowed.to(mask.device)] = 0
        constrained = scores + mask
        # Where all that is allowed was forbidden before, the constraint goes first.
        stuck = constrained.amax(dim=-1).isneginf().reshape(-1, self.num_beams).all(dim=-1)
        stuck = stuck.repeat_interleave(self.num_beams)
        return torch.where(stuck[:, None], mask, constrained)

    def _begins(self, rows: int, padding: Tensor | None) -> list[int]:
        """Return the columns added in front of each row since the prompt."""
        if padding is None:
            return [0] * rows
        return (padding if self.padding is None else padding - self.padding).tolist()
