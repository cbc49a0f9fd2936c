"""The chunked and the single-step state space against the recurrence that defines them."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops.ssd import only, recurrence, ssd, ssd_step, step_sizes
from support import relative_error


class Sizes(NamedTuple):
    B: int = 2
    T: int = 70
    H: int = 4
    P: int = 3
    G: int = 2
    N: int = 5


def operands(sizes: Sizes, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, A, b, c, D and a state; decays from nearly none to all at once."""
    B, T, H, P, G, N = sizes
    made = [
        torch.randn(B, T, H, P),
        torch.rand(B, T, H).square() * 2,
        -torch.logspace(-2, 1.5, H),
        torch.randn(B, T, G, N),
        torch.randn(B, T, G, N),
        torch.randn(H),
        torch.randn(B, H, P, N),
    ]
    return [x.to(dtype) for x in made]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.builds(
        lambda B, T, R, P, G, N: Sizes(B, T, R * G, P, G, N),
        *(st.integers(1, most) for most in (3, 150, 3, 4, 3, 6)),
    ),
    chunk_size=st.integers(1, 300),
    continues=st.booleans(),
)
def test_chunks_equal_the_recurrence(sizes: Sizes, chunk_size: int, continues: bool) -> None:
    *inputs, state = operands(sizes)
    start = state if continues else None
    y, last = ssd(*inputs, start, chunk_size=chunk_size)
    expected, expected_last = recurrence(*inputs, start)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last, expected_last)


@pytest.mark.parametrize("chunk_size", [7, 64])
def test_gradients_of_chunks_equal_those_of_the_recurrence(chunk_size: int) -> None:
    inputs = [x.requires_grad_() for x in operands(Sizes())]
    shapes = [x.shape for x in recurrence(*inputs)]
    upstream = [torch.randn(shape).double() for shape in shapes]
    expected = torch.autograd.grad(recurrence(*inputs), inputs, upstream)
    made = torch.autograd.grad(ssd(*inputs, chunk_size=chunk_size), inputs, upstream)
    for mine, other in zip(made, expected, strict=True):
        assert relative_error(mine, other) < 1e-12


def test_float32_keeps_long_texts_apart_from_rounding() -> None:
    inputs = operands(Sizes(T=3000))
    single = [x.float() for x in inputs]
    y, last = ssd(*single)
    expected, expected_last = recurrence(*(x.double() for x in single))
    assert relative_error(y.double(), expected) < 1e-5
    assert relative_error(last.double(), expected_last) < 1e-5


@pytest.mark.parametrize("records", [True, False])
def test_steps_equal_the_recurrence(records: bool) -> None:
    *inputs, state = operands(Sizes(T=9))
    x, dt, A, b, c, D = (v.requires_grad_(records) for v in inputs)
    expected, expected_last = recurrence(x, dt, A, b, c, D, state)
    own, outputs = state.clone(), []
    for t in range(9):
        at = slice(t, t + 1)
        y, new = ssd_step(x[:, at], dt[:, at], A, b[:, at], c[:, at], D, own)
        assert (new is own) is not records  # autograd still needs the old state
        own = new
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected)
    torch.testing.assert_close(own, expected_last)
    if records:
        made = torch.autograd.grad(torch.cat(outputs, dim=1).sum(), [x, dt, A, b, c, D])
        other = torch.autograd.grad(expected.sum(), [x, dt, A, b, c, D])
        for mine, theirs in zip(made, other, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_step_takes_one_exponential_a_head() -> None:
    *inputs, state = operands(Sizes(T=1), torch.float32)
    taken: list[int] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "exp" in str(func) and "expand" not in str(func):
                taken.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    with Count():
        ssd_step(*inputs, state)
    assert taken == [2 * 4]


def test_padding_leaves_the_state_as_it_is() -> None:
    x, dt, A, b, c, D, state = operands(Sizes(B=3, T=11))
    counts = torch.tensor([0, 4, 11])
    y, last = ssd(x, only(dt, counts), A, b, c, D, state, chunk_size=3)
    for row, count in enumerate(counts.tolist()):
        at = slice(row, row + 1)
        if count == 0:
            assert torch.equal(last[at], state[at])
            continue
        part = [v[at, :count] for v in (x, dt)] + [A] + [v[at, :count] for v in (b, c)] + [D]
        expected, expected_last = recurrence(*part, state[at])
        torch.testing.assert_close(y[at, :count], expected)
        torch.testing.assert_close(last[at], expected_last)


def test_step_sizes_are_clamped_and_nothing_for_padding() -> None:
    raw, bias = torch.tensor([[[-9.0, 0.0], [9.0, 1.0]]]), torch.tensor([0.0, 1.0])
    plain = torch.nn.functional.softplus(raw + bias)
    assert torch.equal(step_sizes(raw, bias, (0.0, float("inf")), None), plain)
    assert torch.equal(step_sizes(raw, bias, (0.5, 2.0), None), plain.clamp(0.5, 2.0))
    padded = step_sizes(raw, bias, (0.5, 2.0), torch.tensor([1]))
    assert torch.equal(padded[:, 0], plain[:, 0].clamp(0.5, 2.0))
    assert not padded[:, 1].any()
    assert step_sizes(raw.bfloat16(), bias, (0.0, 1.0), None).dtype == torch.float32


def test_groups_are_not_repeated_to_heads() -> None:
    """c·bᵀ is made once a group: no product of L × L has a batch of heads times N."""
    inputs = operands(Sizes(B=1, T=64, H=12, P=4, G=2, N=8), torch.float32)
    seen: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.bmm.default:
                seen.append((*args[0].shape, args[1].shape[-1]))
            return func(*args, **(kwargs or {}))

    with Watch():
        ssd(*inputs)
    batches = [batch for batch, rows, inner, columns in seen if 8 in (rows, inner, columns)]
    assert batches
    assert set(batches) == {2}
