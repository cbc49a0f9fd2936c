"""Packing moves padding behind the tokens, for any mask, and unpacking undoes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops.ragged import keys_in_columns, ragged


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(bits).reshape(rows, columns)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(mask=masks(), dtype=st.sampled_from([torch.bool, torch.long, torch.float32]))
def test_pack_moves_tokens_to_the_front_in_order_and_unpack_is_its_inverse(
    mask: Tensor, dtype: torch.dtype
) -> None:
    rows = ragged(mask.to(dtype))
    if bool(mask.all()):
        assert rows is None
        return
    assert rows is not None
    x = torch.arange(mask.numel() * 2.0).reshape(*mask.shape, 2)
    packed = rows.pack(x)
    assert rows.counts.tolist() == mask.sum(dim=1).tolist()
    for row, count in enumerate(rows.counts.tolist()):
        assert torch.equal(packed[row, :count], x[row][mask[row]])
        assert torch.equal(packed[row, count:], x[row][~mask[row]])
    assert torch.equal(rows.unpack(packed), x)
    assert torch.equal(rows.pack(rows.unpack(x)), x)


def test_order_is_kept_in_long_rows() -> None:
    mask = torch.rand(2, 4000) < 0.5
    rows = ragged(mask)
    assert rows is not None
    for row in range(2):
        assert torch.equal(rows.order[row, : rows.counts[row]], mask[row].nonzero()[:, 0])


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_any_number_of_axes_follows_along(shape: tuple[int, ...]) -> None:
    rows = ragged(torch.tensor([[0, 1, 1], [1, 0, 1]]))
    assert rows is not None
    x = torch.randn(shape, requires_grad=True)
    packed = rows.pack(x)
    assert torch.equal(packed[0, 0], x[0, 1])
    assert torch.equal(packed[1, 1], x[1, 2])
    (gradient,) = torch.autograd.grad(packed[0, :2].sum(), x)
    assert torch.equal(gradient[0, 0], torch.zeros(shape[2:]))
    assert torch.equal(gradient[0, 1], torch.ones(shape[2:]))


def test_weights_over_slots_go_to_the_columns_of_their_tokens() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    weights = torch.rand(3, 2, 4, 5)
    placed = keys_in_columns(weights, mask)
    assert placed.shape == (3, 2, 4, 5)
    zero = torch.zeros(2, 4)
    for column, slot in enumerate([None, 0, 1, None, 2]):
        assert torch.equal(placed[0, ..., column], zero if slot is None else weights[0, ..., slot])
    assert torch.equal(placed[1], weights[1])
    assert not placed[2].any()


def test_fewer_slots_than_columns_are_enough() -> None:
    weights = torch.rand(1, 1, 1, 2)
    placed = keys_in_columns(weights, torch.tensor([[0, 0, 1, 1]]))
    assert torch.equal(placed[..., 2:], weights)
    assert not placed[..., :2].any()
