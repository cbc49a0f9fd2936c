"""Absorbed attention by the kernel against its definition in float64."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels.latent import attend_latents
from quintet.ops.masks import AttentionMask, causal_mask
from quintet.ops.mla import absorbed

# The mapped query, the weights, their mixture and the result are rounded to bfloat16.
BOUND = 2**-7


def problem(B: int, H: int, T: int, S: int, Dn: int, Dr: int, Dv: int, R: int) -> list[Tensor]:
    """What a layer has: heads strided, latents at the front of a cache with room to spare."""
    shapes = [(B, T, H, Dn), (B, T, H, Dr), (B, S + 5, R), (B, S + 5, Dr), (H, Dn + Dv, R)]
    q_nope, q_pe, c_kv, k_pe, w_kv = (torch.randn(shape).bfloat16() for shape in shapes)
    return [q_nope.transpose(1, 2), q_pe.transpose(1, 2), c_kv[:, :S], k_pe[:, :S], w_kv / R**0.5]


def definition(inputs: list[Tensor], start: Tensor, scale: float) -> Tensor:
    T, S = inputs[0].shape[2], inputs[2].shape[1]
    mask = causal_mask(start[:, None] + torch.arange(T), S, None)
    wide = [x.double() for x in inputs]
    seen = AttentionMask(mask, False, start, None)
    return absorbed(*wide, seen, scale=scale, dropout=0.0)[0]


def magnitude(inputs: list[Tensor], start: Tensor, scale: float) -> Tensor:
    """The mixture of the latents' absolute values, by the weights of the latents as they are."""
    q_nope, q_pe, c_kv, k_pe, w_kv = (x.double() for x in inputs)
    T, S, Dn = q_nope.shape[2], c_kv.shape[1], q_nope.shape[3]
    mask = causal_mask(start[:, None] + torch.arange(T), S, None)
    seen = AttentionMask(mask, False, start, None)
    _, weights = absorbed(q_nope, q_pe, c_kv, k_pe, w_kv, seen, scale=scale, dropout=0.0)
    return torch.einsum("bhts,bsr,hdr->bhtd", weights, c_kv.abs(), w_kv[:, Dn:])


def error(made: Tensor, exact: Tensor) -> float:
    return float((made.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    B=st.integers(1, 3),
    H=st.sampled_from([1, 3, 16, 40]),
    T=st.integers(1, 7),
    past=st.integers(0, 400),
    Dn=st.integers(1, 20).map(lambda half: 2 * half),
    Dr=st.integers(1, 10).map(lambda half: 2 * half),
    Dv=st.integers(1, 40),
    R=st.sampled_from([32, 64, 96]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**30),
)
def test_it_is_absorbed_attention(
    level: str,
    B: int,
    H: int,
    T: int,
    past: int,
    Dn: int,
    Dr: int,
    Dv: int,
    R: int,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    inputs = problem(B, H, T, past + T, Dn, Dr, Dv, R)
    start = torch.randint(0, past + 1, (B,))
    scale = (Dn + Dr) ** -0.5
    made = attend_latents(*inputs, start=start, scale=scale)
    assert made is not None
    assert made.shape == (B, H, T, Dv)
    # Beside what is added, without its signs: where terms cancel, their rounding stays.
    *others, c_kv, k_pe, w_kv = inputs
    exact = definition(inputs, start, scale)
    w_uv = torch.cat((w_kv[:, :Dn], w_kv[:, Dn:].abs()), dim=1)
    limit = magnitude([*others, c_kv, k_pe, w_uv], start, scale)
    assert float((made.double() - exact).norm() / limit.norm()) < BOUND


def test_released_sizes_meet_the_bound(level: str) -> None:
    inputs = problem(2, 16, 1, 300, 128, 64, 128, 512)
    start = torch.tensor([299, 120])
    made = attend_latents(*inputs, start=start, scale=192**-0.5)
    assert made is not None
    assert error(made, definition(inputs, start, 192**-0.5)) < BOUND


def test_one_start_is_that_of_all_rows(level: str) -> None:
    inputs = problem(2, 4, 2, 90, 16, 8, 12, 32)
    one = attend_latents(*inputs, start=88, scale=0.2)
    each = attend_latents(*inputs, start=torch.tensor([88, 88]), scale=0.2)
    assert one is not None
    assert each is not None
    assert torch.equal(one, each)


def test_latents_behind_the_last_query_are_not_read(level: str) -> None:
    """As in a preallocated cache: what it holds there is meaningless."""
    inputs = problem(1, 4, 2, 200, 16, 8, 12, 32)
    start = torch.tensor([37])
    clean = attend_latents(*inputs, start=start, scale=0.2)
    inputs[2][:, 39:], inputs[3][:, 39:] = torch.nan, torch.nan
    made = attend_latents(*inputs, start=start, scale=0.2)
    assert clean is not None
    assert made is not None
    assert torch.equal(made, clean)


def test_it_leaves_to_torch_what_it_is_not_for(level: str) -> None:
    inputs = problem(1, 2, 1, 9, 16, 8, 12, 32)
    assert attend_latents(*inputs, start=8, scale=1.0) is not None
    assert attend_latents(*(x.float() for x in inputs), start=8, scale=1.0) is None
    narrow = problem(1, 2, 1, 9, 16, 8, 12, 24)
    assert attend_latents(*narrow, start=8, scale=1.0) is None
    inputs[4].requires_grad_()
    assert attend_latents(*inputs, start=8, scale=1.0) is None
