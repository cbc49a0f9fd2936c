"""The decode loop: one forward a step, one token for each row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quintet.cache import Cache
from quintet.generation.processors import Chooser

__all__ = ["LanguageModel", "Prompt", "decode"]


class LanguageModel(Protocol):
    """What the loop needs of a model: a forward that continues from a cache."""

    def __call__(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        use_cache: bool,
        logits_to_keep: int,
        return_dict: bool,
    ) -> Any:
        """Return an output with `logits` (B, logits_to_keep, V)."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens to continue: (B, T) ids, with padding on the left where `mask` (B, T) is 0."""

    ids: Tensor
    mask: Tensor | None

    @classmethod
    def left_padded(cls, ids: Tensor, mask: Tensor | None) -> "Prompt":
        """Move padding in front, so that every row's last column is its last token."""
        if mask is None or bool(mask.all()):
            return cls(ids, None)
        mask = mask.to(torch.bool)
        order = torch.argsort(mask.to(torch.int8), dim=1, stable=True)
        return cls(ids.gather(1, order), mask.gather(1, order))


def decode(
    model: LanguageModel,
    prompt: Prompt,
    choose: Chooser,
    *,
    cache: Cache | None,
    max_new_tokens: int,
    eos: Tensor,
    pad: int,
) -> Iterator[Tensor]:
    """Yield the next token of every row (B,), until all have ended or `max_new_tokens` are made.

    A row that has ended yields `pad`. Without a cache, every step runs over the whole text.
    """
    ids, mask = prompt.ids, prompt.mask
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    unfinished = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    step_ids, step_mask = ids, mask
    for made in range(max_new_tokens):
        logits = model(
            step_ids,
            attention_mask=step_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
            return_dict=True,
        ).logits[:, -1]
        token = choose(logits, ids, kept, made)
        token = torch.where(unfinished, token, pad)
        yield token
        unfinished = unfinished & ~torch.isin(token, eos)
        if not bool(unfinished.any()):
            return
        ids = torch.cat((ids, token[:, None]), dim=1)
        kept = torch.cat((kept, torch.ones_like(kept[:, :1])), dim=1)
        if cache is None:
            step_ids, step_mask = ids, None if mask is None else kept
        else:
            step_ids, step_mask = token[:, None], None
