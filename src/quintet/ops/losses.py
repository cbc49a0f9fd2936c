"""The losses of the heads, in float32."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import InputError

__all__ = ["next_token_loss", "sequence_loss", "span_loss", "token_loss"]

IGNORED = -100


def next_token_loss(logits: Tensor, labels: Tensor, ahead: int = 1) -> Tensor:
    """Cross-entropy of each token given those before it, averaged over labels that are not -100.

    Shapes: logits (B, T, V), labels (B, T); the label of position t is compared at t - `ahead`.
    """
    # The labels are moved, not the logits: a slice of those is copied, and so is its gradient.
    shifted = F.pad(labels[:, ahead:], (0, min(ahead, labels.shape[1])), value=IGNORED)
    return token_loss(logits, shifted)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each position's label; logits (B, T, V), labels (B, T)."""
    if labels.shape != logits.shape[:-1]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)} and there are logits of "
            f"{tuple(logits.shape[:-1])} tokens; give a label for each, or {IGNORED}"
        )
    _check_labels(labels, logits.shape[-1])
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).to(torch.float32),
        labels.reshape(-1).to(logits.device, torch.long),
        ignore_index=IGNORED,
    )


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Regression, single-label or multi-label loss of whole sequences.

    Shapes: logits (B, L); labels (B,) or (B, L), classes for "single_label_classification",
    targets for "regression" (mean squared error), 0..1 for "multi_label_classification".
    """
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification":
        labels = labels.reshape(-1)
        if labels.shape != logits.shape[:1]:
            raise InputError(
                f"{len(labels)} labels and {len(logits)} sequences; "
                f"problem_type={problem_type!r} takes one class for each"
            )
        _check_labels(labels, logits.shape[-1])
        return F.cross_entropy(logits.to(torch.float32), labels.to(torch.long))
    if problem_type == "regression" and logits.shape[-1] == 1:
        logits, labels = logits.squeeze(-1), labels.reshape(-1)
    if logits.shape != labels.shape:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)} for problem_type={problem_type!r}"
        )
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits.to(torch.float32), labels.to(torch.float32))


def span_loss(
    start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor
) -> Tensor:
    """Mean cross-entropy of where an answer starts and ends; logits (B, T), positions (B,).

    A position past the end is an answer that was cut off and does not count.
    """
    T = start_logits.shape[-1]
    losses = [
        F.cross_entropy(
            logits.to(torch.float32),
            positions.reshape(-1).to(logits.device).clamp(0, T),
            ignore_index=T,
        )
        for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
    ]
    return (losses[0] + losses[1]) / 2


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point():
        raise InputError(f"labels have dtype {labels.dtype}; classes are integers")
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or labels.numel() == 0:
        return
    counted = labels[labels != IGNORED]
    if counted.numel() and (counted.min() < 0 or counted.max() >= classes):
        bad = int(counted.min() if counted.min() < 0 else counted.max())
        raise InputError(
            f"labels hold {bad}; a label is 0 to {classes - 1}, or {IGNORED} to be ignored"
        )
