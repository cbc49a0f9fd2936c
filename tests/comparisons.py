"""How models of ours and of Transformers are compared; tolerances: docs/numerics.md."""

import torch
from torch import Tensor

__all__ = ["PADDING", "TOLERANCE", "assert_gradients_equal", "batch", "calmed", "counted_labels"]

TOLERANCE = 1e-5
PADDING = ("none", "left", "right")


def batch(padding: str, B: int = 3, T: int = 21) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Ids, mask and, where Transformers needs them to count from the first token, positions."""
    ids = torch.randint(1, 101, (B, T))
    mask = torch.ones(B, T, dtype=torch.long)
    extra = {}
    if padding == "left":
        mask[1, :7], mask[2, :2] = 0, 0
        extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if padding == "right":
        mask[1, -7:], mask[2, -2:] = 0, 0
    return ids, mask, extra


def counted_labels(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels of tokens that a token precedes: a prediction made from padding means nothing."""
    labels = ids.masked_fill(mask == 0, -100)
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return labels.masked_fill(before == 0, -100)


def assert_gradients_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Compare the gradients of all parameters, by the scale of each part of a layer.

    A key's bias cancels in the softmax, so that its own gradient is rounding alone.
    """
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    scales: dict[str, float] = {}
    for name, parameter in other.items():
        assert parameter.grad is not None, name
        part = name.rsplit(".", 2)[0]
        scales[part] = max(scales.get(part, 0.0), float(parameter.grad.abs().max()))
    for name, parameter in mine.items():
        expected = other[name].grad
        assert parameter.grad is not None, name
        assert expected is not None
        error = float((parameter.grad - expected).abs().max())
        assert error <= TOLERANCE * scales[name.rsplit(".", 2)[0]], name


@torch.no_grad()
def calmed(*models: torch.nn.Module) -> None:
    """Halve the matrices: at the spread that other tests have, layers amplify what is rounded."""
    for model in models:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.5)
