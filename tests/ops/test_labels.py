"""Labels go to the token before theirs, as if the padding between were not there."""

import pytest
import torch
from torch import Tensor

from quintet.ops.labels import following, following_tokens, of_tokens, predicted

B, T = 6, 9


def padded(seed: int) -> tuple[Tensor, Tensor]:
    """Labels, one in five of them none, and a mask with padding anywhere."""
    torch.manual_seed(seed)
    labels = torch.randint(1, 50, (B, T))
    labels[torch.rand(B, T) < 0.2] = -100
    mask = (torch.rand(B, T) < 0.7).long()
    mask[0], mask[1] = 1, 0
    mask[2] = (torch.arange(T) < 5).long()
    mask[3] = (torch.arange(T) >= 4).long()
    return labels, mask


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_a_row_has_the_targets_it_has_alone(seed: int, ahead: int) -> None:
    labels, mask = padded(seed)
    made = following_tokens(labels, mask, ahead)
    for row in range(B):
        kept = mask[row].bool()
        alone = following(labels[row, kept][None], ahead)[0]
        assert torch.equal(made[row, kept], alone)
        assert (made[row, ~kept] == -100).all()


@pytest.mark.parametrize("seed", range(5))
def test_labels_may_be_told_by_the_column_after(seed: int) -> None:
    labels, mask = padded(seed)
    assert torch.equal(following(predicted(labels, mask)), following_tokens(labels, mask))


def test_without_padding_labels_are_left_alone() -> None:
    labels, mask = padded(0)
    past = torch.cat((mask, torch.ones_like(mask)), dim=1)
    for nothing in (None, torch.ones_like(mask), past):
        assert predicted(labels, nothing) is labels
        assert torch.equal(following_tokens(labels, nothing), following(labels))
    assert of_tokens(labels, None) is labels


def test_a_mask_may_begin_in_the_past() -> None:
    labels, mask = padded(1)
    longer = torch.cat((torch.ones(B, 4).long(), mask), dim=1)
    assert torch.equal(following_tokens(labels, longer), following_tokens(labels, mask))
    assert torch.equal(of_tokens(labels, longer), of_tokens(labels, mask))
