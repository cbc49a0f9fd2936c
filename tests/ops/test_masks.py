"""Masks against loops that spell out who sees whom."""

import pytest
import torch
from torch import Tensor

from quintet.ops.masks import AttentionMask, attention_mask_of, causal_mask

WINDOWS = pytest.mark.parametrize("window", [None, 1, 3, 100], ids=lambda w: f"window-{w}")


def spelt_out(slots: Tensor, S: int, window: int | None) -> Tensor:
    mask = torch.zeros(*slots.shape, S, dtype=torch.bool)
    for row in range(slots.shape[0]):
        for t in range(slots.shape[1]):
            for s in range(S):
                behind = int(slots[row, t]) - s
                mask[row, t, s] = behind >= 0 and (window is None or behind < window)
    return mask[:, None]


def meaning(seen: AttentionMask, T: int, S: int) -> Tensor:
    """What a mask says, as a mask (1 or B, 1, T, S)."""
    if seen.entries is not None:
        assert not seen.is_causal
        return seen.entries
    if seen.is_causal:
        assert T == S
        return torch.ones(T, S, dtype=torch.bool).tril()[None, None]
    return torch.ones(1, 1, T, S, dtype=torch.bool)


@WINDOWS
@pytest.mark.parametrize("S", [1, 5, 12], ids=lambda S: f"S{S}")
def test_causal_mask(S: int, window: int | None) -> None:
    slots = torch.tensor([[0, 1, 2], [4, 5, 6], [9, 10, 11]])
    assert torch.equal(causal_mask(slots, S, window), spelt_out(slots, S, window))


@WINDOWS
@pytest.mark.parametrize("T", [1, 2, 6], ids=lambda T: f"T{T}")
@pytest.mark.parametrize("start", [0, 1, 4], ids=lambda start: f"start{start}")
@pytest.mark.parametrize("spare", [0, 7], ids=["growing", "preallocated"])
def test_mask_of_rows_that_share_a_start(
    T: int, start: int, spare: int, window: int | None
) -> None:
    slots, S = torch.arange(start, start + T)[None], start + T + spare
    seen = attention_mask_of(slots, start, S, window)
    assert torch.equal(meaning(seen, T, S).expand(1, 1, T, S), spelt_out(slots, S, window))
    assert not seen.custom
    assert seen.start == start
    assert (seen.window is None) == (window is None or start + T <= window)


@WINDOWS
@pytest.mark.parametrize("T", [1, 3], ids=lambda T: f"T{T}")
def test_mask_of_rows_with_their_own_start(T: int, window: int | None) -> None:
    start = torch.tensor([0, 2, 5])
    slots, S = start[:, None] + torch.arange(T), 5 + T
    seen = attention_mask_of(slots, start, S, window)
    assert seen.entries is not None
    assert torch.equal(seen.entries, spelt_out(slots, S, window))
    assert seen.start is start
    assert seen.window == window


@pytest.mark.parametrize(
    ("T", "start", "S"),
    [pytest.param(8, 0, 8, id="prompt"), pytest.param(1, 8, 9, id="step")],
)
def test_the_usual_cases_need_no_mask(T: int, start: int, S: int) -> None:
    seen = attention_mask_of(torch.arange(start, start + T)[None], start, S, None)
    assert seen.entries is None
    assert seen.is_causal == (T > 1)


def test_a_mask_of_the_callers_own_is_taken_as_it_is() -> None:
    custom = torch.zeros(1, 1, 3, 3)
    seen = attention_mask_of(torch.arange(3)[None], 0, 3, 2, custom)
    assert seen.entries is custom
    assert seen.custom
    assert not seen.is_causal
