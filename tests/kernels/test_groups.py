"""Kernels of weights in groups, against the numbers they stand for."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels.gated import gated
from quintet.kernels.linear import STEP_TOKENS, linears, widen
from quintet.kernels.matrix import Kind, Matrix, common_kind, kind_of
from quintet.ops.group_fit import quantize_groups
from quintet.ops.groups import widen_groups
from quintet.ops.quantized import quantize_int4, quantize_int8

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
LAYOUTS = {
    "q4_0": partial(quantize_groups, bits=4, group=32),
    "q4_1": partial(quantize_groups, bits=4, group=32, offset=True),
    "q4_k": partial(quantize_groups, bits=4, group=32, offset=True, dtype=F32),
    "awq": partial(quantize_groups, bits=4, group=128, offset=True),
    "gptq": partial(quantize_groups, bits=4, group=64, dtype=F16),
    "row": partial(quantize_groups, bits=4, group=None, dtype=BF16),
    "iq4": partial(quantize_groups, bits=4, group=32, iq4=True),
    "iq4-wide": partial(quantize_groups, bits=4, group=256, dtype=BF16, iq4=True),
    "q8_0": partial(quantize_groups, bits=8, group=32),
    "q6_k": partial(quantize_groups, bits=8, group=16, dtype=F32),
    "q2_k": partial(quantize_groups, bits=8, group=16, offset=True, dtype=F32),
    "q5_1": partial(quantize_groups, bits=8, group=32, offset=True),
    "w8": partial(quantize_groups, bits=8, group=128, dtype=BF16),
    "w8-row": partial(quantize_groups, bits=8, group=None, dtype=F32),
}
layouts = st.sampled_from(list(LAYOUTS))
# The vectors' 16 bits, and for bfloat16 the rounding of the result.
BOUND = {F32: 2**-12, BF16: 2**-7}
dtypes = st.sampled_from([F32, BF16])
widths = st.one_of(st.integers(1, 300), st.sampled_from([512, 576, 896, 1024]))
many = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def held(layout: str, w: Tensor) -> tuple[Matrix, Tensor]:
    """A weight as kernels read it, and the numbers it stands for."""
    numbers, scale, offset = LAYOUTS[layout](w)
    matrix = Matrix(numbers, scale, None, offset, layout.startswith("iq4"))
    return matrix, widen_groups(numbers, scale, offset, w.shape[-1], iq4=matrix.iq4).double()


@many
@given(
    layout=layouts,
    dtype=dtypes,
    M=st.integers(1, STEP_TOKENS),
    I=widths,
    O=st.integers(1, 40),
    threads=st.integers(1, 3),
    biased=st.booleans(),
)
def test_products_are_those_of_the_numbers_it_stands_for(
    level: str, layout: str, dtype: torch.dtype, M: int, I: int, O: int, threads: int, biased: bool
) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(M, I).to(dtype)
    (matrix, w), (other, v) = held(layout, torch.randn(O, I)), held("q8_0", torch.randn(3, I))
    bias = torch.randn(O).to(dtype) if biased else None
    made = linears(x, [matrix._replace(bias=bias), other])
    assert made is not None
    for y, numbers, more in ((made[0], w, bias), (made[1], v, None)):
        exact = x.double() @ numbers.T + (0 if more is None else more.double())
        size = torch.maximum((x.double().abs() @ numbers.abs().T).max(), exact.abs().max()) + 1e-9
        assert float((y.double() - exact).abs().max() / size) <= BOUND[dtype]


@many
@given(layout=layouts, I=widths, O=st.integers(1, 30), M=st.integers(2, 16), data=st.data())
def test_a_vector_is_mapped_alike_alone_and_beside_others(
    level: str, layout: str, I: int, O: int, M: int, data: st.DataObject
) -> None:
    matrix, _ = held(layout, torch.randn(O, I))
    x = torch.randn(M, I).to(BF16)
    torch.set_num_threads(1)
    alone = [linears(x[m : m + 1], [matrix]) for m in range(M)]
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    beside = linears(x, [matrix])
    assert beside is not None
    for m, one in enumerate(alone):
        assert one is not None
        assert torch.equal(one[0][0].view(torch.int16), beside[0][m].view(torch.int16))


@many
@given(
    layout=layouts,
    dtype=dtypes,
    shape=st.sampled_from([(1, 1), (3, 7, 64), (5, 1), (4, 100), (2, 3, 129), (4, 1100)]),
)
def test_widening_is_the_formula_to_the_bit(
    level: str, layout: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    matrix, w = held(layout, torch.randn(shape))
    made = widen(matrix, shape[-1], dtype)
    assert made is not None
    assert torch.equal(made, w.to(F32).to(dtype))


@many
@given(
    gates=layouts,
    downs=layouts,
    dtype=dtypes,
    N=st.integers(1, 12),
    A=st.integers(1, 4),
    C=st.integers(1, 100),
    width=st.integers(1, 100),
)
def test_the_experts_of_each_token_may_be_of_two_layouts(
    level: str, gates: str, downs: str, dtype: torch.dtype, N: int, A: int, C: int, width: int
) -> None:
    E = 5
    x, shares = torch.randn(N, C).to(dtype), torch.rand(N, A)
    indices = torch.rand(N, E).topk(A).indices
    both, w = held(gates, torch.randn(E, 2 * width, C) / C**0.5)
    down, d = held(downs, torch.randn(E, C, width) / width**0.5)
    halves = (slice(0, width), slice(width, 2 * width))
    gate, up = (both.rows((slice(None), half)) for half in halves)
    made = gated(x, gate, up, down, indices, shares)
    assert made is not None
    exact = torch.zeros(N, C, dtype=torch.float64)
    size = 1e-9
    for n in range(N):
        for expert, share in zip(indices[n], shares[n], strict=True):
            g, u = w[expert, :width], w[expert, width:]
            one, wide = x[n].double(), x[n].double().abs()
            exact[n] += share * (d[expert] @ (F.silu(g @ one) * (u @ one)))
            hidden = (g.abs() @ wide) * (u.abs() @ wide)
            size = max(size, float((d[expert].abs() @ hidden).max()))
    assert float((made.double() - exact).abs().max()) <= 2 * BOUND[dtype] * size


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("layout", ["q4_0", "q4_1", "q8_0", "q2_k"])
def test_it_does_not_hide_a_broken_input(level: str, layout: str, value: float) -> None:
    x = torch.zeros(2, 100)
    x[1, 70] = value
    made = linears(x, [held(layout, torch.randn(3, 100))[0]])
    assert made is not None
    assert made[0][0].tolist() == [0, 0, 0]
    assert made[0][1].isnan().all()


def test_integers_of_other_kinds_are_groups_too() -> None:
    w = torch.randn(8, 128)
    eight, four = Matrix(*quantize_int8(w)), Matrix(*quantize_int4(w))
    assert [kind_of(m) for m in (eight, four, Matrix(w))] == [Kind.INT8, Kind.INT4, Kind.PLAIN]
    assert common_kind([eight, four]) == Kind.GROUPS
    x = torch.randn(2, 128)
    together = linears(x, [eight, four])
    assert together is not None
    for made, matrix in zip(together, (eight, four), strict=True):
        (own,) = linears(x, [matrix]) or ()
        torch.testing.assert_close(made, own)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m._replace(scale=m.scale[:, :-1]),
        lambda m: m._replace(scale=m.scale.double()),
        lambda m: m._replace(offset=m.offset[:3]),
        lambda m: m._replace(offset=m.offset.float()),
        lambda m: m._replace(weight=m.weight[:, 1:]),
        lambda m: m._replace(weight=m.weight.view(torch.int8)),
        lambda m: m._replace(scale=None),
    ],
)
def test_what_does_not_fit_is_left_to_pytorch(level: str, wrong: object) -> None:
    matrix, _ = held("q4_1", torch.randn(4, 200))
    assert linears(torch.randn(1, 200), [matrix]) is not None
    assert linears(torch.randn(1, 200), [wrong(matrix)]) is None  # type: ignore[operator]
