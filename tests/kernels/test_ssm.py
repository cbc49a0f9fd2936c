"""The fused mixer of Mamba-2 against its steps one by one."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels.ssm import MixerWeights, mamba2
from quintet.ops.mamba2 import Mixed, mix, mix_stepwise

BOUND = {torch.float32: 4e-5, torch.bfloat16: 2**-6}


def random_weights(H: int, P: int, G: int, N: int, W: int, dtype: torch.dtype) -> MixerWeights:
    C = H * P + 2 * G * N
    return MixerWeights(
        taps=(torch.randn(C, W) / 2).to(dtype),
        conv_bias=torch.randn(C).to(dtype),
        dt_bias=torch.randn(H),
        A_log=torch.rand(H) * 4 - 1,
        D=torch.randn(H),
        norm=torch.randn(H * P).to(dtype),
        num_groups=G,
        dt_limits=(0.001, 5.0),
        eps=1e-5,
    )


def both(
    projected: Tensor,
    weights: MixerWeights,
    window: Tensor | None,
    state: Tensor | None,
    counts: Tensor | None,
) -> tuple[Mixed, Mixed]:
    """What the kernel makes, and the steps in the same inputs but float64."""
    copy = None if state is None else state.clone()
    made = mix(projected, weights, window, copy, counts, chunk_size=64)
    exact = mix_stepwise(
        projected.double(),
        MixerWeights(*(x.double() if isinstance(x, Tensor) else x for x in weights)),
        None if window is None else window.double(),
        None if state is None else state.double(),
        counts,
        chunk_size=64,
    )
    return made, exact


def assert_close(made: Tensor, exact: Tensor, bound: float, name: str) -> None:
    scale = exact.abs().max().clamp(min=1e-6)
    assert float((made.double() - exact).abs().max() / scale) < bound, name


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    B=st.integers(1, 3),
    T=st.one_of(st.integers(1, 9), st.integers(1, 150)),
    G=st.integers(1, 2),
    heads=st.integers(1, 3),
    P=st.sampled_from([16, 48, 64]),
    N=st.sampled_from([16, 32]),
    W=st.integers(2, 4),
    first=st.booleans(),
    ragged=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_it_is_convolution_recurrence_and_gate(
    level: str,
    dtype: torch.dtype,
    B: int,
    T: int,
    G: int,
    heads: int,
    P: int,
    N: int,
    W: int,
    first: bool,
    ragged: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1 + seed % 3)
    H = G * heads
    weights = random_weights(H, P, G, N, W, dtype)
    C = weights.taps.shape[0]
    projected = torch.randn(B, T, H * P + C + H).to(dtype)
    window = None if first else torch.randn(B, W - 1, C).to(dtype)
    state = None if first else torch.randn(B, H, P, N)
    counts = torch.randint(0, T + 1, (B,)) if ragged else None
    made, exact = both(projected, weights, window, state, counts)
    # Where a row nearly cancels, its norm magnifies every rounding, those of the steps too.
    plain = mix_stepwise(projected, weights, window, state, counts, chunk_size=64)
    off = float((plain.out - exact.out).abs().max() / exact.out.abs().max())
    bound = max(BOUND[dtype], 3 * off)
    real = (
        torch.ones(B, T, 1)
        if counts is None
        else torch.arange(T)[None, :, None] < counts.view(B, 1, 1)
    )
    assert_close(made.out * real, exact.out * real, bound, "out")
    assert torch.equal(made.window, exact.window.to(dtype))
    # Inside, all is in float32 whatever goes in and out.
    assert_close(made.state, exact.state, 1e-5, "state")
    assert_close(made.convolved, exact.convolved, 1e-5, "convolved")
    assert_close(made.dt, exact.dt, 1e-5, "dt")


def test_it_is_what_runs(level: str) -> None:
    weights = random_weights(4, 16, 1, 16, 4, torch.float32)
    projected = torch.randn(1, 3, 64 + 96 + 4)
    state = torch.zeros(1, 4, 16, 16)
    made = mix(projected, weights, None, state, None, chunk_size=64)
    assert made.state is state
    assert state.any()


def test_decays_that_vanish_are_neither_slow_nor_wrong(level: str) -> None:
    weights = random_weights(2, 16, 1, 16, 4, torch.float32)._replace(
        A_log=torch.tensor([4.0, -9.0])
    )
    projected = torch.randn(1, 400, 32 + 64 + 2) * 3
    made, exact = both(projected, weights, None, None, None)
    assert_close(made.out, exact.out, 1e-5, "out")
    assert_close(made.state, exact.state, 1e-5, "state")


def test_it_leaves_to_torch_what_it_is_not_for(level: str) -> None:
    weights = random_weights(2, 16, 1, 16, 4, torch.float32)
    projected = torch.randn(1, 3, 32 + 64 + 2)

    def made(projected: Tensor, weights: MixerWeights) -> object:
        return mamba2(projected, weights, window=None, state=None, counts=None)

    assert made(projected, weights) is not None
    assert made(projected.double(), weights) is None
    assert made(projected.clone().requires_grad_(), weights) is None
    assert made(projected, random_weights(4, 8, 1, 16, 4, torch.float32)) is None
