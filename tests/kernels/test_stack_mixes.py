"""One call takes any mix of tokens, and each sequence comes out as it does alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.formulas import BOUND, KINDS, Case, Maker
from quintet.kernels import parts
from quintet.kernels.routing import Rules
from quintet.kernels.stack import MOST_TOKENS, Stack

# Rows of the cache, the slot each is at, and how many tokens it has.
MIXES = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.permutations(range(9)).map(lambda rows: rows[:n]),
        st.lists(st.integers(0, 600), min_size=n, max_size=n),
        st.lists(st.integers(1, 8), min_size=n, max_size=n),
    )
)
SLOTS, ROWS, D = 640, 9, 16


def cases(maker: Maker, family: str) -> list[Case]:
    starts = [SLOTS - 4] * ROWS
    rules = Rules(active=2, normalise=True)
    if family == "dense":
        return [maker.attention(starts, 1, 2, 3, D, None), maker.mlp(72), maker.final_norm()]
    if family == "window":
        return [maker.attention(starts, 1, 1, 2, D, 40), maker.mlp(72)]
    if family == "hybrid":
        return [
            maker.mixer(ROWS, 4, 2, beside=False),
            maker.attention(starts, 1, 2, 2, D, None, shared=True, rank=5),
            maker.shared_mlp(72, 3, bias=True),
            maker.mixer(ROWS, 4, 1, beside=True),
        ]
    if family == "experts":
        return [maker.attention(starts, 1, 2, 1, D, None), maker.routed(6, 40, 72, rules, False)]
    return [maker.latent(starts, 1, 3, 20, True), maker.routed(6, 40, 0, rules, wide=True)]


def run(
    stack: Stack,
    kept: list[tuple[Tensor, ...]],
    x: Tensor,
    angles: Tensor,
    mix: list[tuple[int, int, int]],
) -> Tensor:
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    tokens = parts.Tokens(cos, sin, 1 - x, *zip(*mix, strict=True))
    made = stack.run(x, tokens, kept)
    assert made is not None
    return made


@pytest.mark.parametrize("family", ["dense", "window", "hybrid", "experts", "latent"])
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    mix=MIXES,
    threads=st.integers(1, 3),
    alone=st.integers(1, 3),
    dtype=st.sampled_from(list(BOUND)),
)
def test_a_sequence_comes_out_of_any_mix_as_it_does_alone(
    level: str,
    kind: str,
    family: str,
    mix: tuple[list[int], list[int], list[int]],
    threads: int,
    alone: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(sum(mix[1]))
    M = sum(mix[2])
    # Beyond a few tokens, layers in float32 are called.
    plain = family != "latent" and (kind != "plain" or MOST_TOKENS["f32"] >= M)
    maker = Maker(kind, dtype if plain else torch.bfloat16, 64)
    made_of = cases(maker, family)
    kept = [tuple(x.nan_to_num(0.5) for x in case.kept) for case in made_of]
    own = [tuple(x.clone() for x in held) for held in kept]
    stack = Stack.of([case.part for case in made_of], 64, maker.dtype)
    assert stack is not None
    x = torch.randn(M, 64).to(maker.dtype)
    angles = torch.randn(M, (8 if family == "latent" else D) // 2).repeat(1, 2)
    torch.set_num_threads(threads)
    made = run(stack, kept, x, angles, list(zip(*mix, strict=True)))
    torch.set_num_threads(alone)
    first = 0
    for row, start, length in zip(*mix, strict=True):
        tokens = slice(first, first + length)
        single = run(stack, own, x[tokens], angles[tokens], [(row, start, length)])
        torch.testing.assert_close(single, made[tokens], rtol=0, atol=0)
        first += length
