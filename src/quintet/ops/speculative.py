"""Acceptance of drafted tokens: greedy, or by rejection sampling.

Shapes: drafted tokens (B, K), of which the first `counts` of each row are drafts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_likeliest(
    likeliest: Sequence[Sequence[int]], drafted: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[int]:
    """Return the number of each row's drafts that match the most likely tokens."""
    return [
        _run([a == b for a, b in zip(own, row, strict=False)], count)
        for own, row, count in zip(likeliest, drafted, counts, strict=True)
    ]


def keep_sampled(
    p: Tensor, q: Tensor | None, drafted: Tensor, counts: Sequence[int], u: Tensor
) -> tuple[list[int], Tensor]:
    """Accept each draft with probability min(1, p/q) (arXiv:2211.17192).

    Returns how many of each row are kept, and what the token behind them is to be drawn from:
    max(p - q, 0) at the place of the first rejection, or p behind the last draft. So the tokens
    are distributed as p, whatever q is.

    Shapes: p (B, K + 1, V) and q (B, K, V) probabilities, q None if drafts were not drawn but
    certain; u (B, K) uniform in [0, 1); returns (B, V), which need not sum to 1.
    """
    K = drafted.shape[1]
    if not K:
        return [0] * len(p), p[:, 0]
    of_draft = p[:, :K].gather(2, drafted[..., None])[..., 0]
    accepted = u < of_draft if q is None else u * q.gather(2, drafted[..., None])[..., 0] < of_draft
    n = [_run(row, count) for row, count in zip(accepted.tolist(), counts, strict=True)]
    next_p = _gather_rows(p, n)
    rejected = [accepted < count for accepted, count in zip(n, counts, strict=True)]
    if any(rejected):
        places = [min(place, K - 1) for place in n]
        rest = residual(
            next_p, _gather_rows(drafted, places), None if q is None else _gather_rows(q, places)
        )
        chosen = torch.tensor(rejected, dtype=torch.bool, device=p.device)
        next_p = rest if all(rejected) else torch.where(chosen[:, None], rest, next_p)
    return n, next_p


def residual(p: Tensor, rejected: Tensor, q: Tensor | None) -> Tensor:
    """Return max(p - q, 0), (B, V); q is one-hot at the rejected token if None."""
    rest = p.scatter(1, rejected[:, None], 0.0) if q is None else (p - q).clamp(min=0)
    # Where p and q are the same but for rounding, nothing would be left to draw.
    return torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)


def _gather_rows(x: Tensor, places: Sequence[int]) -> Tensor:
    """Select each row's entry of (B, K, ...)."""
    if len(places) == 1:
        return x[:, places[0]]
    rows = torch.arange(len(x), dtype=torch.long, device=x.device)
    return x[rows, torch.tensor(places, dtype=torch.long, device=x.device)]


def _run(accepted: Sequence[bool], count: int) -> int:
    """Return the number of drafts, of the first `count`, that are accepted before a rejection."""
    return next((place for place in range(count) if not accepted[place]), count)
