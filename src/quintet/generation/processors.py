"""The one place where a logit becomes a token."""

from dataclasses import dataclass
from typing import Self

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Chooser:
    """Reshapes the logits of a step, in the order Transformers does, and takes a token.

    Attributes are the options of `GenerationConfig` of the same names, with their defaults, and
    `first`, (B, V) of True for what may be the first token.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    first: Tensor | None = None
    generator: torch.Generator | None = None

    @classmethod
    def from_config(
        cls,
        config: GenerationConfig,
        *,
        first: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Take over the options that are set."""
        given = {k: v for k, v in vars(config).items() if k in cls.__slots__ and v is not None}
        eos = tuple(config.eos_token_ids)
        return cls(**given, eos_token_ids=eos, first=first, generator=generator)

    def __call__(self, logits: Tensor, ids: Tensor, kept: Tensor, new_tokens: int) -> Tensor:
        """Choose a token for each row.

        Shapes: logits (B, V); ids and kept (B, T), the text so far and where it is not padding;
        returns (B,).
        """
        logits = logits.to(torch.float32)
        if new_tokens == 0 and self.first is not None:
            logits = logits.masked_fill(~self.first, -torch.inf)
        if self.repetition_penalty != 1.0:
            logits = penalise_repetition(logits, ids, kept, self.repetition_penalty)
        if new_tokens < self.min_new_tokens:
            logits = logits.clone()
            logits[:, self.eos_token_ids] = -torch.inf
        if not self.do_sample:
            return logits.argmax(dim=-1)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.top_k > 0:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1.0:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p > 0.0:
            logits = keep_min_p(logits, self.min_p)
        return draw(logits, self.generator)
