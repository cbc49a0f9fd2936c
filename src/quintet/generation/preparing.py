"""Methods of a model for decode loops other than `generate()`."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from quintet.cache import Cache, LegacyCache
from quintet.generation.transitions import transition_scores


class DecodeHelpers:
    """Prepares forwards and scores generated tokens, under Transformers' names."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **others: Any,
    ) -> dict[str, Any]:
        """Return the forward's arguments for the next token.

        Args:
            input_ids: (B, T) the text so far.
            next_sequence_length: how many of its last tokens to run over; those that the cache
                does not hold if not given.
            past_key_values: what holds the beginning of the text.
            attention_mask: (B, T), 0 for padding.
            inputs_embeds: (B, T, C) in place of the ids of a prompt.
            is_first_iteration: accepted; whether there is a past says the same.
            **others: further arguments of the forward, handed on.
        """
        text = next_inputs(
            input_ids, past_key_values, attention_mask, inputs_embeds, next_sequence_length
        )
        return {**text, **others}

    def prepares_otherwise(self) -> bool:
        """Return whether `prepare_inputs_for_generation` was replaced."""
        mine: Any = DecodeHelpers.prepare_inputs_for_generation
        put: Any = self.prepare_inputs_for_generation
        return not isinstance(put, MethodType) or put.__func__ is not mine

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: tuple[Tensor, ...],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """Return the score of each generated token, (B, new).

        Args:
            sequences: (B, T + new), as `generate` returns them.
            scores: (B, V) of every step, as `generate(output_scores=True)` returns them.
            beam_indices: (B, new), as a beam search returns them.
            normalize_logits: take log-probabilities of the scores.
        """
        return transition_scores(sequences, scores, beam_indices, normalize=normalize_logits)


def next_inputs(
    input_ids: Tensor,
    past: Cache | LegacyCache | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    new: int | None,
) -> dict[str, Any]:
    """Return the forward's arguments for a text (B, T) and its cache.

    Args:
        input_ids: (B, T) all ids so far.
        past: what holds the beginning of the text.
        attention_mask: (B, T), 0 for padding; or with what came before the ids in front.
        inputs_embeds: (B, T, C) in place of ids while there is no past.
        new: how many of the last columns to run over; what the cache does not hold if not given.
    """
    T = input_ids.shape[1]
    inputs: dict[str, Any] = {"past_key_values": past, "attention_mask": attention_mask}
    if new is None:
        new = T if past is None else _behind(past, input_ids, attention_mask)
    if inputs_embeds is not None and not _cached_lengths(past, input_ids).any():
        return {"input_ids": None, "inputs_embeds": inputs_embeds[:, -new:], **inputs}
    return {"input_ids": input_ids[:, -new:].contiguous(), **inputs}


def _behind(past: Cache | LegacyCache, input_ids: Tensor, mask: Tensor | None) -> int:
    """Return the largest number of columns the cache lacks in any row."""
    tokens = input_ids.shape[1] if mask is None else mask.to(torch.bool).sum(dim=1)
    # It may hold more than the ids, where what came before them was none.
    return max(1, int((tokens - _cached_lengths(past, input_ids)).max()))


def _cached_lengths(past: Cache | LegacyCache | None, input_ids: Tensor) -> Tensor:
    """Return the number of tokens of each row in the cache."""
    B = input_ids.shape[0]
    if isinstance(past, Cache):
        return past.lengths(B, input_ids.device)
    return input_ids.new_full((B,), past[0][0].shape[-2] if past else 0)
