"""Which drafted tokens stay: by the most likely token, or by rejection sampling.

Shapes: drafted tokens (B, K), of which the first `counts` (B,) of each row are drafts; what the
model says of the K + 1 tokens behind the text and each draft, (B, K + 1, V). Both rules return
tokens (B, K + 1) and how many of them are to be taken, (B,): drafts and one of the model's own.
"""

import torch
from torch import Tensor

__all__ = ["keep_likeliest", "keep_sampled", "residual"]


def keep_likeliest(scores: Tensor, drafted: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Keep drafts for as long as they are the model's most likely tokens."""
    chosen = scores.argmax(dim=-1)
    return chosen, _run(chosen[:, :-1] == drafted, counts) + 1


def keep_sampled(
    p: Tensor, q: Tensor | None, drafted: Tensor, counts: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep each draft with probability min(1, p/q), until one is rejected (arXiv:2211.17192).

    What comes next is drawn from the third value that is returned, max(p - q, 0) at the place of
    the first rejection, or p behind the last draft: so the tokens are distributed as p, whatever
    q is. Its token is left to the caller to write at place `counts` - 1.

    Shapes: p (B, K + 1, V) and q (B, K, V) probabilities, q None where drafts were not drawn but
    certain; u (B, K) uniform in [0, 1); returns (B, V) last, which need not sum to 1.
    """
    K = drafted.shape[1]
    of_draft = p[:, :K].gather(2, drafted[..., None])[..., 0]
    kept = u < of_draft if q is None else u * q.gather(2, drafted[..., None])[..., 0] < of_draft
    n = _run(kept, counts)
    rows = torch.arange(len(p), device=p.device)
    next_p = p[rows, n]
    if K:
        place = n.clamp(max=K - 1)
        told = drafted[rows, place]
        rest = residual(next_p, told, None if q is None else q[rows, place])
        next_p = torch.where((n < counts)[:, None], rest, next_p)
    tokens = torch.cat((drafted, drafted.new_zeros(len(drafted), 1)), dim=1)
    return tokens, n + 1, next_p


def residual(p: Tensor, rejected: Tensor, q: Tensor | None) -> Tensor:
    """Return max(p - q, 0), (B, V), with q certain of the rejected token where it is None."""
    if q is None:
        return p.scatter(1, rejected[:, None], 0.0)
    rest = (p - q).clamp(min=0)
    # Where p and q are the same but for rounding, nothing would be left to draw.
    return torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)


def _run(kept: Tensor, counts: Tensor) -> Tensor:
    """Return how many of the first `counts` (B,) of each row are kept before one is not."""
    places = torch.arange(kept.shape[1], device=kept.device)
    return (kept & (places < counts[:, None])).to(torch.long).cumprod(dim=1).sum(dim=1)
