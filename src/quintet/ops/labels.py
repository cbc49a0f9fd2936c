"""Labels for losses: checked, shifted, and masked where there is padding."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quintet.errors import InputError
from quintet.ops.ragged import ragged
from quintet.ops.transforms import batched

IGNORED = -100


def following(labels: Tensor, ahead: int = 1, none: int = IGNORED) -> Tensor:
    """Shift labels (B, T) by `ahead`, ignoring the end."""
    # Labels are moved, not logits: a slice of those would be copied, and so would its gradient.
    return F.pad(labels[:, ahead:], (0, min(ahead, labels.shape[1])), value=none)


def following_tokens(labels: Tensor, mask: Tensor | None, ahead: int = 1) -> Tensor:
    """Shift labels by `ahead` tokens within each row, skipping padding.

    Padding (mask 0) predicts nothing and is not predicted, wherever it is: with `following` alone
    it would stand between tokens. Shapes: labels (B, T), mask (B, past + T).
    """
    rows = None if mask is None else ragged(mask[:, -labels.shape[1] :].to(labels.device))
    if rows is None:
        return following(labels, ahead)
    return rows.unpack(following(rows.pack(of_tokens(labels, mask)), ahead))


def predicted(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Mask labels (B, T) at padding, for `following`."""
    if mask is None or ragged(mask[:, -labels.shape[1] :]) is None:
        return labels
    return F.pad(following_tokens(labels, mask)[:, :-1], (1, 0), value=IGNORED)


def of_tokens(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Mask labels (B, T) at padding, by a mask (B, past + T)."""
    if mask is None:
        return labels
    return labels.masked_fill(mask[:, -labels.shape[1] :].to(labels.device) == 0, IGNORED)


# -- what is refused -------------------------------------------------------------------------


def readable(x: Tensor) -> bool:
    """Return whether reading a tensor's values waits for no device or compiler."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or batched())


def check_classes(labels: Tensor, classes: int, name: str = "labels") -> None:
    """Check that labels are class indices or -100.

    Raises:
        InputError: they are not. On a GPU the numbers are not looked at.
    """
    _check_integers(labels, name, "classes")
    if not readable(labels):
        return
    counted = labels[labels != IGNORED]
    if counted.numel() and (counted.min() < 0 or counted.max() >= classes):
        bad = int(counted.min() if counted.min() < 0 else counted.max())
        raise InputError(
            f"{name} hold {bad}; a label is 0 to {classes - 1}, or {IGNORED} to be ignored"
        )


def check_targets(labels: Tensor, between: tuple[float, float] | None = None) -> None:
    """Check that labels are finite, and in a range if given.

    Raises:
        InputError: they are not. On a GPU the numbers are not looked at.
    """
    if labels.is_complex():
        raise InputError(f"labels have dtype {labels.dtype}; they are real numbers")
    if not readable(labels):
        return
    good = labels.isfinite()
    valid = "finite numbers"
    if between is not None:
        good &= (labels >= between[0]) & (labels <= between[1])
        valid = f"{between[0]:g} to {between[1]:g}, one for each label that may hold"
    if not good.all():
        raise InputError(f"labels hold {labels[~good][0].item():g}; they are {valid}")


def check_positions(positions: Tensor, rows: int, name: str) -> Tensor:
    """Return one position per row, (B,), from (B,) or (B, 1).

    Raises:
        InputError: it is not that. On a GPU the numbers are not looked at.
    """
    _check_integers(positions, name, "places of tokens")
    if positions.shape not in ((rows,), (rows, 1)):
        raise InputError(
            f"{name} have shape {tuple(positions.shape)}; give one place for each of {rows} rows"
        )
    if readable(positions) and positions.numel() and positions.min() < 0:
        raise InputError(
            f"{name} hold {int(positions.min())}; a place is at least 0, and behind the end of the "
            "text where the answer was cut off"
        )
    return positions.reshape(rows)


def _check_integers(labels: Tensor, name: str, kind: str) -> None:
    if not isinstance(labels, Tensor):
        raise InputError(f"{name} is a {type(labels).__name__}; give a tensor of integers")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{name} have dtype {labels.dtype}; {kind} are integers")
