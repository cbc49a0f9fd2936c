"""From logits to a token: what reshapes the distribution, and the draw from it.

Every function takes logits (B, V) in float32 and returns logits (B, V); a token that must not be
drawn has -inf.
"""

import torch
from torch import Tensor

__all__ = [
    "draw",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "penalise_repetition",
]


def penalise_repetition(logits: Tensor, ids: Tensor, kept: Tensor, penalty: float) -> Tensor:
    """Make tokens that occurred less likely by the factor `penalty` (arXiv:1909.05858, §4.1).

    Shapes: ids (B, T), kept (B, T) True where an id is a token of the text and not padding.
    """
    # Padding is a write of False that must not undo a True, so it goes through a sum.
    occurred = torch.zeros_like(logits).scatter_add_(1, ids, kept.to(logits.dtype)) > 0
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(occurred, penalised, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens, and those that tie with the last of them."""
    k = min(k, logits.shape[-1])
    least = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to p or more (arXiv:1904.09751)."""
    values, order = logits.sort(dim=-1, descending=True)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = (before >= p).scatter(1, order, before >= p)
    return logits.masked_fill(dropped, -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least `p` times as likely as the most likely one (arXiv:2407.01082)."""
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


def draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one token a row from softmax(logits), (B, V) -> (B,)."""
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
