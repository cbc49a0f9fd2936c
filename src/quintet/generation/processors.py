"""Which operations reshape the logits of a step, in the order Transformers applies them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.generation.config import GenerationConfig
from quintet.ops.sampling import (
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)

__all__ = ["Chooser"]


@dataclass(frozen=True, slots=True)
class Chooser:
    """The one place where a logit becomes a token."""

    config: GenerationConfig
    generator: torch.Generator | None

    def __call__(self, logits: Tensor, ids: Tensor, kept: Tensor, new_tokens: int) -> Tensor:
        """Choose a token for each row.

        Shapes: logits (B, V); ids and kept (B, T), the text so far and where it is not padding;
        returns (B,).
        """
        config = self.config
        logits = logits.to(torch.float32)
        if config.repetition_penalty != 1.0:
            logits = penalise_repetition(logits, ids, kept, config.repetition_penalty)
        if config.min_new_tokens is not None and new_tokens < config.min_new_tokens:
            logits = logits.clone()
            logits[:, config.eos_token_ids] = -torch.inf
        if not config.do_sample:
            return logits.argmax(dim=-1)
        if config.temperature != 1.0:
            logits = logits / config.temperature
        if config.top_k > 0:
            logits = keep_top_k(logits, config.top_k)
        if config.top_p < 1.0:
            logits = keep_top_p(logits, config.top_p)
        if config.min_p is not None:
            logits = keep_min_p(logits, config.min_p)
        return draw(logits, self.generator)
