"""Experts by the kernel against the loop over them in float64."""

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels.grouped import grouped_silu_experts
from quintet.ops.moe import looped_experts

# What is between the maps, an expert's output and the sum are rounded to bfloat16.
BOUND = 2**-7


def problem(N: int, C: int, width: int, E: int, A: int) -> tuple[Tensor, ...]:
    x = torch.randn(N, C).bfloat16()
    gate_up = (torch.randn(E, 2 * width, C) / C**0.5).bfloat16()
    down = (torch.randn(E, C, width) / width**0.5).bfloat16()
    return x, torch.rand(N, E).topk(A).indices, torch.rand(N, A), gate_up, down


def error(made: Tensor, exact: Tensor) -> float:
    return float((made.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def definition(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    wide = (x.double(), indices, weights.double(), gate_up.double(), down.double())
    return looped_experts(*wide, F.silu)


def magnitude(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The sum of what is added, without its signs: where terms cancel, their rounding stays."""
    terms = []
    for chosen, shares in zip(indices.T, weights.T, strict=True):
        gate, up = (gate_up[chosen].double() @ x.double()[..., None]).chunk(2, dim=1)
        terms.append(
            down[chosen].double().abs() @ (F.silu(gate) * up).abs() * shares[:, None, None]
        )
    return torch.stack(terms).sum(dim=0).squeeze(-1)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    N=st.integers(1, 40),
    C=st.integers(1, 100),
    width=st.integers(1, 70),
    E=st.integers(1, 9),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**30),
    data=st.data(),
)
def test_it_is_the_sum_of_a_tokens_experts(
    level: str, N: int, C: int, width: int, E: int, threads: int, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    inputs = problem(N, C, width, E, data.draw(st.integers(1, E)))
    made = grouped_silu_experts(*inputs)
    assert made is not None
    assert made.shape == (N, C)
    difference = (made.double() - definition(*inputs)).abs()
    # Three roundings, of up to 2⁻⁸ each.
    assert bool((difference <= 0.012 * magnitude(*inputs) + 1e-6).all())


def test_more_tokens_of_one_expert_than_a_block_has(level: str) -> None:
    inputs = problem(500, 64, 48, 3, 2)
    inputs[1][:400, 0], inputs[1][:400, 1] = 1, 2
    made = grouped_silu_experts(*inputs)
    assert made is not None
    assert error(made, definition(*inputs)) < BOUND


def test_tokens_of_which_not_all_outputs_are_held_at_once(level: str) -> None:
    # 16 experts of 4,096 numbers: 256 tokens fill the room for outputs that wait.
    inputs = problem(260, 4096, 4, 16, 16)
    made = grouped_silu_experts(*inputs)
    assert made is not None
    assert error(made, definition(*inputs)) < BOUND


def test_results_do_not_depend_on_the_threads(level: str) -> None:
    inputs = problem(90, 64, 48, 8, 3)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(grouped_silu_experts(*inputs))
    assert results[0] is not None
    for other in results[1:]:
        assert other is not None
        assert torch.equal(results[0], other)


def test_experts_nobody_chose_are_not_read(level: str) -> None:
    x, indices, weights, gate_up, down = problem(9, 12, 7, 5, 2)
    indices[indices == 4] = 0
    gate_up[4], down[4] = torch.nan, torch.nan
    made = grouped_silu_experts(x, indices, weights, gate_up, down)
    assert made is not None
    assert bool(made.isfinite().all())


def test_it_leaves_to_torch_what_it_is_not_for(level: str) -> None:
    x, indices, weights, gate_up, down = problem(9, 12, 7, 5, 2)
    assert grouped_silu_experts(x, indices, weights, gate_up, down) is not None
    wide = (x.float(), indices, weights, gate_up.float(), down.float())
    assert grouped_silu_experts(*wide) is None
    assert grouped_silu_experts(x, indices, weights, gate_up.mT.contiguous().mT, down) is None
    assert grouped_silu_experts(x, indices, weights, gate_up.requires_grad_(), down) is None


def test_experts_that_do_not_exist_are_refused(level: str) -> None:
    x, indices, weights, gate_up, down = problem(9, 12, 7, 5, 2)
    for wrong in (-1, 5, 2**40):
        indices[3, 1] = wrong
        assert grouped_silu_experts(x, indices, weights, gate_up, down) is None
    indices[3, 1] = 4
    assert grouped_silu_experts(x, indices, weights, gate_up, down) is not None
    assert grouped_silu_experts(x[:8], indices, weights, gate_up, down) is None
    assert grouped_silu_experts(x, indices, weights[:, :1], gate_up, down) is None
