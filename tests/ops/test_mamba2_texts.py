"""Texts in a packed row go through the mixer as each does alone, from where it is kept."""

from itertools import pairwise

import pytest
import torch

from quintet.kernels.ssm import MixerWeights
from quintet.ops.mamba2 import mix_stepwise
from quintet.ops.mamba2_texts import mix_texts
from quintet.triton.texts import Texts

COUNTS = [3, 0, 1, 6]
H, P, G, N, W = 4, 2, 2, 3, 4
INNER, C = H * P, H * P + 2 * G * N


@pytest.mark.parametrize("rows", [None, [5, 2, 0, 1], [3, -1, 4, -1]])
@pytest.mark.parametrize("kept", [True, False])
def test_each_text_as_alone(rows: list[int] | None, kept: bool) -> None:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    scalars = randn(H), randn(H), randn(H)
    weights = MixerWeights(randn(C, W), randn(C), *scalars, randn(INNER), G, (0.001, 9.0), 1e-5)
    projected = randn(sum(COUNTS), INNER + C + H)
    window, state = (randn(6, W - 1, C), randn(6, H, P, N)) if kept else (None, None)
    before = (window.clone(), state.clone()) if window is not None and state is not None else None
    ends = torch.tensor([0, *COUNTS]).cumsum(0).int()
    where = None if rows is None else torch.tensor(rows).int()
    texts = Texts(len(COUNTS), max(COUNTS), ends, where)
    made = mix_texts(projected, weights, texts=texts, window=window, state=state)
    untouched = set(range(6))
    for i, (begin, end) in enumerate(pairwise(ends.tolist())):
        row = i if rows is None else rows[i]
        held = [None, None]
        if before is not None and row >= 0:
            held = [x[row, None].clone() for x in before]
        if begin == end:
            continue
        right = mix_stepwise(projected[None, begin:end], weights, *held, None, chunk_size=64)
        for own, other in zip(made, (right.out, right.convolved, right.dt), strict=True):
            torch.testing.assert_close(own[begin:end], other[0])
        if window is not None and state is not None and row >= 0:
            untouched.remove(row)
            torch.testing.assert_close(window[row], right.window[0])
            torch.testing.assert_close(state[row], right.state[0])
    if before is not None and window is not None and state is not None:
        for row in untouched:
            assert torch.equal(window[row], before[0][row])
            assert torch.equal(state[row], before[1][row])
