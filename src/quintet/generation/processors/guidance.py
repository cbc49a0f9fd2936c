"""Classifier-free guidance."""

from typing import Any, Protocol

import torch
from torch import Tensor

from quintet.cache import Cache
from quintet.errors import InputError
from quintet.generation.processors.base import LogitsProcessor, positive_float


class _Model(Protocol):
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        past_key_values: Cache | None,
        use_cache: bool,
        logits_to_keep: int,
    ) -> Any: ...


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """u + g·(s - u): log-probabilities s, and u given a negative prompt.

    (arXiv:2306.17806)

    Args:
        guidance_scale: g; above 1 leads away from the negative prompt.
        model: what computes u, behind the negative prompt and all tokens that are added.
        unconditional_ids: the negative prompt, (B, T); each row is that of B' / B rows of scores
            (B', V). The last token of the text if not given.
        unconditional_attention_mask: (B, T), 0 for padding.
        use_cache: keep what the next step needs.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: _Model,
        unconditional_ids: Tensor | None = None,
        unconditional_attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
    ) -> None:
        self.guidance_scale = positive_float("guidance_scale", guidance_scale)
        self.model = model
        self.use_cache = use_cache is not False
        ids, mask = unconditional_ids, unconditional_attention_mask
        if mask is not None and (ids is None or mask.shape != ids.shape):
            raise InputError(
                f"negative_prompt_attention_mask has shape {tuple(mask.shape)}; it has to be that "
                "of negative_prompt_ids"
            )
        self._ids, self._mask = ids, mask
        self._cache: Cache | None = None
        # How many columns of the text there were at the last step.
        self._seen: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.log_softmax(dim=-1)
        if self.guidance_scale == 1:
            return scores
        logits = self._unconditional(input_ids).to(scores)
        without = logits.log_softmax(dim=-1)
        return self.guidance_scale * (scores - without) + without

    def reorder(self, rows: Tensor) -> None:
        """Reorder rows (B,) for beam search."""
        if self._cache is not None:
            self._cache.reorder_cache(rows)
        if self._ids is not None and self._mask is not None:
            self._ids, self._mask = self._ids[rows], self._mask[rows]

    def _unconditional(self, input_ids: Tensor) -> Tensor:
        """Return the logits (B, V) given negative prompt and new tokens."""
        new: Tensor | None
        if self._seen is None:
            self._begin(input_ids)
            new, mask = self._ids, self._mask
        else:
            assert self._ids is not None
            assert self._mask is not None
            new, mask = input_ids[:, self._seen :], None
            if new.shape[1] == 0:
                raise InputError(
                    "guidance follows a text from token to token, and this one did not grow; "
                    "make a new processor for a new text"
                )
            self._ids = torch.cat((self._ids, new), dim=1)
            self._mask = torch.cat((self._mask, torch.ones_like(new)), dim=1)
            if not self.use_cache:
                new, mask = self._ids, self._mask
        self._seen = input_ids.shape[1]
        assert new is not None
        output = self.model(
            new,
            mask,
            past_key_values=self._cache,
            use_cache=self.use_cache,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        if self._cache is not None:
            self._cache.in_fused_session = True
        logits: Tensor = output.logits[:, -1]
        return logits

    def _begin(self, input_ids: Tensor) -> None:
        ids = input_ids[:, -1:] if self._ids is None else self._ids.to(input_ids.device)
        if len(input_ids) % len(ids):
            raise InputError(
                f"negative_prompt_ids has {len(ids)} rows for a text of {len(input_ids)}; give one "
                "for each prompt"
            )
        mask = torch.ones_like(ids) if self._mask is None else self._mask.to(ids)
        # Padding goes in front, so that the last column is the last token.
        order = torch.argsort(mask, dim=1, stable=True)
        copies = len(input_ids) // len(ids)
        self._ids = ids.gather(1, order).repeat_interleave(copies, dim=0)
        self._mask = mask.gather(1, order).repeat_interleave(copies, dim=0)
