"""The losses of the heads, in float32.

`items` is how many there are in all where a batch is given in parts, so that the losses of the
parts add up to that of the whole.
"""

import warnings

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.configuration.numbers import is_finite
from quintet.errors import InputError, shown
from quintet.ops.labels import (
    IGNORED,
    check_classes,
    check_positions,
    check_targets,
    following,
    readable,
)

Items = int | float | Tensor | None


def next_token_loss(
    logits: Tensor, labels: Tensor, ahead: int = 1, items: Items = None, ignored: int = IGNORED
) -> Tensor:
    """Cross-entropy of each token given those before it, averaged over labels that count.

    Shapes: logits (B, T, V), labels (B, T); the label of position t is compared at t - `ahead`.
    """
    return token_loss(logits, following(labels, ahead, ignored), items, ignored)


def token_loss(
    logits: Tensor, labels: Tensor, items: Items = None, ignored: int = IGNORED
) -> Tensor:
    """Cross-entropy of each position's label, -100 for none; logits (..., V), labels (...)."""
    if labels.shape != logits.shape[:-1]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)} and there are logits of "
            f"{tuple(logits.shape[:-1])} tokens; give a label for each, or {IGNORED}"
        )
    if ignored != IGNORED:
        labels = labels.masked_fill(labels == ignored, IGNORED)
    check_classes(labels, logits.shape[-1])
    return _cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), items)


def sequence_loss(logits: Tensor, labels: Tensor, problem_type: str, items: Items = None) -> Tensor:
    """Regression, single-label or multi-label loss of whole sequences.

    Shapes: logits (B, L); labels (B,) or (B, L), classes for "single_label_classification",
    targets for "regression" (mean squared error), 0..1 for "multi_label_classification".
    """
    if not isinstance(labels, Tensor):
        raise InputError(f"labels is a {type(labels).__name__}; it has to be a tensor")
    labels = labels.to(logits.device)
    if problem_type == "single_label_classification":
        if labels.shape not in (logits.shape[:1], (len(logits), 1)):
            raise InputError(
                f"labels of shape {tuple(labels.shape)} for {len(logits)} sequences; "
                f"problem_type={problem_type!r} takes one class for each"
            )
        check_classes(labels, logits.shape[-1])
        return _cross_entropy(logits, labels.reshape(-1), items)
    if problem_type == "regression" and logits.shape[-1] == 1:
        logits, labels = logits.squeeze(-1), labels.reshape(-1)
    if logits.shape != labels.shape:
        raise InputError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)} for problem_type={problem_type!r}"
        )
    regression = problem_type == "regression"
    check_targets(labels, None if regression else (0, 1))
    loss = F.mse_loss if regression else F.binary_cross_entropy_with_logits
    total = loss(logits.to(torch.float32), labels.to(torch.float32), reduction="sum")
    return averaged(total, total.new_full((), labels.numel()), items)


def span_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    mask: Tensor | None = None,
    items: Items = None,
) -> Tensor:
    """Mean cross-entropy of where an answer starts and ends; logits (B, T), positions (B,).

    A place that is no token of its row, as the mask (B, past + T) tells, is an answer that was
    cut off and does not count; and no row's answer is looked for in its padding.
    """
    B, T = start_logits.shape
    losses = []
    for logits, positions, name in (
        (start_logits, start_positions, "start_positions"),
        (end_logits, end_positions, "end_positions"),
    ):
        places = check_positions(positions, B, name).to(logits.device, torch.long)
        places = places.masked_fill(places >= T, IGNORED)
        logits = logits.to(torch.float32)
        if mask is not None:
            tokens = mask[:, -T:].to(logits.device) != 0
            lost = ~tokens.gather(1, places.clamp(min=0)[:, None]).squeeze(1)
            places = places.masked_fill(lost, IGNORED)
            # A row that is all padding has no place that counts, but has to have one.
            tokens = tokens | ~tokens.any(dim=1, keepdim=True)
            logits = logits.masked_fill(~tokens, -torch.inf)
        losses.append(_cross_entropy(logits, places, items))
    return (losses[0] + losses[1]) / 2


def _cross_entropy(logits: Tensor, labels: Tensor, items: Items) -> Tensor:
    labels = labels.to(logits.device, torch.long)
    logits = logits.to(torch.float32)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return averaged(total, (labels != IGNORED).sum(), items)


def averaged(total: Tensor, counted: Tensor, items: Items) -> Tensor:
    """Divide a sum by the count, or by the caller's `items`; 0 if nothing counts."""
    divisor = counted
    if items is not None:
        if isinstance(items, Tensor):
            single = items.numel() == 1 and not (items.is_complex() or items.dtype == torch.bool)
        else:
            # As far as float32 goes.
            single = is_finite(items) and abs(items) <= 1e30
        if not single:
            raise InputError(f"num_items_in_batch={shown(items)} has to be one number")
        given = items if isinstance(items, Tensor) else total.new_full((), float(items))
        divisor = given.to(total.device).reshape(())
    if readable(total):
        nothing = not counted
        if nothing:
            warnings.warn(
                "no label counts, so that there is nothing to learn from and the loss is 0: each "
                f"is {IGNORED}, at padding, or the first of its row",
                stacklevel=4,
            )
        if not (divisor > 0 or (nothing and divisor == 0)) or torch.isinf(divisor):
            raise InputError(
                f"num_items_in_batch={items} has to be how many labels the whole batch has, "
                "at least 1"
            )
    return total / divisor.masked_fill(divisor == 0, 1)
