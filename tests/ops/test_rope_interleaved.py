"""Neighbours rotated together, and what YaRN does to the scores of DeepSeek models."""

import math

import pytest
import torch

from quintet.configuration.rope import RopeParameters
from quintet.ops.rope import (
    attention_factor,
    inverse_frequencies,
    rotary_angles,
    rotate,
    rotate_interleaved,
    score_factor,
)
from support import relative_error


def test_neighbours_turn_like_complex_numbers() -> None:
    B, H, T, D = 2, 3, 7, 10
    rope = RopeParameters(rope_theta=50.0)
    positions = torch.randint(40, (B, T))
    cos, sin = rotary_angles(positions, inverse_frequencies(rope, D), rope)
    q, k = torch.randn(B, H, T, D), torch.randn(B, 1, T, D)

    angles = positions[..., None] * inverse_frequencies(rope, D)  # (B, T, D/2)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    expected_q = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * turn
    expected_k = torch.view_as_complex(k.unflatten(-1, (-1, 2))) * turn
    made_q, made_k = rotate_interleaved(q, cos, sin), rotate_interleaved(k, cos, sin)
    # The layout is that of real parts before imaginary ones.
    assert relative_error(made_q, torch.cat((expected_q.real, expected_q.imag), dim=-1)) < 1e-5
    scores = (expected_q @ expected_k.conj().transpose(-1, -2)).real
    assert relative_error(made_q @ made_k.transpose(-1, -2), scores) < 1e-5


def test_it_is_rotate_after_taking_the_pairs_apart() -> None:
    x = torch.randn(1, 2, 5, 8)
    rope = RopeParameters()
    cos, sin = rotary_angles(torch.arange(5)[None], inverse_frequencies(rope, 8), rope)
    apart = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    assert relative_error(rotate_interleaved(x, cos, sin), rotate(apart, cos, sin)) < 1e-6


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "scores", "angles"),
    [
        pytest.param(1.0, 1.0, (0.1 * math.log(40) + 1) ** 2, 1.0, id="V3"),
        pytest.param(0.707, 0.707, (0.0707 * math.log(40) + 1) ** 2, 1.0, id="V2"),
        pytest.param(None, None, 1.0, 0.1 * math.log(40) + 1, id="plain-yarn"),
    ],
)
def test_the_temperature_goes_to_scores_or_to_angles(
    mscale: float | None, mscale_all_dim: float | None, scores: float, angles: float
) -> None:
    rope = RopeParameters(
        rope_type="yarn",
        factor=40.0,
        original_max_position_embeddings=4096,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    assert score_factor(rope) == pytest.approx(scores)
    assert attention_factor(rope) == pytest.approx(angles)
    assert score_factor(RopeParameters(mscale_all_dim=1.0, factor=40.0)) == 1.0
