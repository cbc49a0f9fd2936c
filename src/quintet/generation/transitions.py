"""Scores of generated tokens."""

import torch
from torch import Tensor

from quintet.errors import InputError


def transition_scores(
    sequences: Tensor,
    scores: tuple[Tensor, ...],
    rows: Tensor | None = None,
    *,
    normalize: bool = False,
) -> Tensor:
    """Return the score of each generated token, (B, new).

    Args:
        sequences: (B, T + new) ids.
        scores: (B', V) of every step.
        rows: (B, new) the row of the scores that each token was added to, -1 behind an end, where
            the score is 0; every row its own if not given.
        normalize: take log-probabilities of the scores.

    Raises:
        InputError: there are no scores, or these are no tensors.
    """
    if not isinstance(sequences, Tensor) or not isinstance(rows, Tensor | None):
        raise InputError(
            "sequences and beam_indices have to be tensors, of what generate() returns"
        )
    if not isinstance(scores, tuple | list) or not all(isinstance(s, Tensor) for s in scores):
        raise InputError("scores have to be a tuple of tensors, of what generate() returns")
    if not scores:
        raise InputError(
            "there are no scores; call generate(return_dict_in_generate=True, output_scores=True)"
        )
    if rows is None:
        rows = torch.arange(len(scores[0]), device=sequences.device, dtype=torch.long)[:, None]
        rows = rows.expand(-1, len(scores))
    new = int((rows >= 0).sum(dim=1).max())
    rows = rows[:, :new].long()
    steps = torch.stack(scores[:new]).to(sequences.device)
    if normalize:
        steps = steps.log_softmax(dim=-1)
    tokens = sequences[:, sequences.shape[1] - new :]
    places = torch.arange(new, device=sequences.device, dtype=torch.long)
    found = steps[places, rows.clamp(min=0), tokens]
    return torch.where(rows < 0, 0.0, found)
