"""Attention in blocks against the formula in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels.attention import attend
from quintet.kernels.build import best_level

# Weights are rounded to bfloat16 once, and so is the result.
BOUND = 2**-7


def formula(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, window: int | None, scale: float
) -> Tensor:
    """Softmax attention; shapes as `attend`, one part each."""
    groups = q.shape[1] // v.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    slots = start[:, None] + torch.arange(q.shape[2])
    distance = slots[:, :, None] - torch.arange(k.shape[2])
    seen = (distance >= 0) & (distance < (window or k.shape[2]))
    scores = (q @ k.mT * scale).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(dim=-1) @ v


def error(made: Tensor, exact: Tensor) -> float:
    return float((made.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    B=st.integers(1, 3),
    K=st.integers(1, 3),
    groups=st.integers(1, 3),
    T=st.integers(1, 150),
    past=st.integers(0, 300),
    D=st.integers(1, 35).map(lambda half: 2 * half),
    Dv=st.sampled_from([32, 64, 96]),
    window=st.one_of(st.none(), st.integers(1, 200)),
    seed=st.integers(0, 2**30),
)
def test_it_is_softmax_attention(
    level: str,
    B: int,
    K: int,
    groups: int,
    T: int,
    past: int,
    D: int,
    Dv: int,
    window: int | None,
    seed: int,
) -> None:
    if level != best_level():
        # What is compiled hastily takes its time, and as many blocks differ in nothing.
        T, past = 1 + T // 2, past // 2
    g = torch.Generator().manual_seed(seed)
    torch.set_num_threads(1 + seed % 3)
    S = T + past
    # Strided, as layers have them.
    q = torch.randn(B, T, K * groups, D, generator=g).bfloat16().transpose(1, 2)
    k = torch.randn(B, K, S + 5, D, generator=g).bfloat16()[:, :, :S]
    v = torch.randn(B, S, K, Dv, generator=g).bfloat16().transpose(1, 2)
    start = torch.randint(0, past + 1, (B,), generator=g)
    made = attend((q,), (k,), v, start=start, window=window, scale=D**-0.5)
    assert made is not None
    assert made.shape == (B, K * groups, T, Dv)
    assert error(made, formula(q, k, v, start, window, D**-0.5)) < BOUND


def test_parts_are_one_vector_and_a_shared_key_is_every_heads(level: str) -> None:
    q = torch.randn(2, 4, 70, 48).bfloat16()
    k = torch.randn(2, 4, 70, 32).bfloat16()
    shared = torch.randn(2, 1, 70, 16).bfloat16()
    v = torch.randn(2, 4, 70, 32).bfloat16()
    joined = torch.cat((k, shared.expand(-1, 4, -1, -1)), dim=-1)
    whole = attend((q,), (joined,), v, start=0, window=None, scale=0.2)
    parts = (q[..., :32], q[..., 32:]), (k, shared)
    made = attend(*parts, v, start=0, window=None, scale=0.2)
    assert whole is not None
    assert made is not None
    assert torch.equal(made, whole)


def test_scores_of_any_size_stay_finite(level: str) -> None:
    q = torch.full((1, 1, 60, 16), 300.0).bfloat16()
    k = torch.cat((q, -q), dim=2)
    v = torch.randn(1, 1, 120, 32).bfloat16()
    for sign in (1.0, -1.0):
        made = attend((q * sign,), (k,), v, start=60, window=None, scale=1.0)
        assert made is not None
        seen = v[:, :, :60] if sign > 0 else v[:, :, 60:61]
        torch.testing.assert_close(
            made[0, 0, 0].float(), seen[0, 0].float().mean(0), rtol=0.02, atol=0.01
        )


@pytest.mark.parametrize("span", [-400.0, -30.0, 6.0, 30.0, 400.0])
def test_scores_that_rise_or_fall_from_block_to_block(level: str, span: float) -> None:
    T = 700
    q = torch.zeros(1, 2, T, 4).bfloat16()
    q[..., 0] = torch.rand(T) + 0.5
    k, v = torch.randn(1, 1, T, 4).bfloat16(), torch.randn(1, 1, T, 32).bfloat16()
    k[..., 0] += torch.linspace(0, span, T)
    made = attend((q,), (k,), v, start=0, window=None, scale=1.0)
    assert made is not None
    assert error(made, formula(q, k, v, torch.zeros(1), None, 1.0)) < BOUND


def test_what_it_was_not_given_is_not_read(level: str) -> None:
    """Keys behind a row's last query may be anything, as in a preallocated cache."""
    q = torch.randn(1, 2, 9, 16).bfloat16()
    k, v = torch.randn(1, 2, 40, 16).bfloat16(), torch.randn(1, 2, 40, 32).bfloat16()
    clean = attend((q,), (k[:, :, :9],), v[:, :, :9], start=0, window=None, scale=0.25)
    k[:, :, 9:], v[:, :, 9:] = torch.nan, torch.nan
    made = attend((q,), (k,), v, start=0, window=None, scale=0.25)
    assert clean is not None
    assert made is not None
    assert torch.equal(made, clean)


def test_few_queries_share_their_keys_among_the_threads(level: str) -> None:
    """Each thread takes some of the keys, one of them maybe none that a row may see."""
    q = torch.randn(2, 2, 3, 16).bfloat16()
    k, v = torch.randn(2, 2, 1500, 16).bfloat16(), torch.randn(2, 2, 1500, 32).bfloat16()
    start = torch.tensor([1497, 3])
    for threads in (1, 3, 5):
        torch.set_num_threads(threads)
        for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
            made = attend(
                (q[rows],), (k[rows],), v[rows], start=start[rows], window=None, scale=1.0
            )
            assert made is not None
            exact = formula(q[rows], k[rows], v[rows], start[rows], None, 1.0)
            assert error(made, exact) < BOUND


def test_a_key_that_is_no_number_shows(level: str) -> None:
    q, v = torch.randn(1, 1, 5, 16).bfloat16(), torch.randn(1, 1, 5, 32).bfloat16()
    k = q.clone()
    k[:, :, 2] = torch.nan
    made = attend((q,), (k,), v, start=0, window=None, scale=1.0)
    assert made is not None
    assert made[0, 0].isnan().any(dim=-1).tolist() == [False, False, True, True, True]


def test_it_leaves_to_torch_what_it_is_not_for(level: str) -> None:
    q = torch.randn(1, 2, 4, 32).bfloat16()

    def made(q: Tensor, v: Tensor) -> Tensor | None:
        return attend((q,), (q,), v, start=0, window=None, scale=1.0)

    assert made(q, q) is not None
    assert made(q.float(), q.float()) is None
    assert made(q[..., :7], q) is None
    assert made(q, q[..., :8]) is None
    assert made(q.requires_grad_(), q) is None
    with torch.no_grad():
        assert made(q, q) is not None
