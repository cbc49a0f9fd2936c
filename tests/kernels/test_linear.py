import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from quintet.kernels.linear import MOST_VECTORS, STEP_TOKENS, linears, widen
from quintet.kernels.matrix import Matrix
from quintet.layers.linear import Linear
from quintet.ops.quantized import quantize_int4, quantize_int8
from support import relative_error

BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=str)


@DTYPES
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    M=st.integers(1, 32),
    I=st.integers(1, 200),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    biased=st.booleans(),
    threads=st.integers(1, 3),
)
def test_it_is_the_sum_of_products(
    level: str, dtype: torch.dtype, M: int, I: int, sizes: list[int], biased: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    M = min(M, MOST_VECTORS["bf16" if dtype == torch.bfloat16 else "f32"])
    x = torch.randn(M, I).to(dtype)
    # Padded with what must not be read.
    wide = [torch.full((O, I + 3), torch.nan, dtype=dtype) for O in sizes]
    for w in wide:
        w[:, :I].normal_()
    maps = [Matrix(w[:, :I], None, torch.randn(len(w)).to(dtype) if biased else None) for w in wide]
    made = linears(x, maps)
    assert made is not None
    for y, (w, _, b, *_) in zip(made, maps, strict=True):
        exact = F.linear(x.double(), w.double(), None if b is None else b.double())
        assert y.dtype == dtype
        # A sum of so many may be next to nothing by chance, and is rounded as others are.
        scale = max(float(exact.abs().max()), I**0.5)
        assert (y.double() - exact).abs().max() <= BOUND[dtype] * scale


@DTYPES
def test_large_maps_are_shared_among_threads(level: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(3)
    for M in (1, 2, 7):
        x, w, v = (torch.randn(n, 333).to(dtype) for n in (M, 1001, 5))
        made = linears(x, [Matrix(w), Matrix(v)])
        assert made is not None
        for y, m in zip(made, (w, v), strict=True):
            assert relative_error(y.double(), F.linear(x.double(), m.double())) <= BOUND[dtype]


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (1, 1, 7)])
def test_shapes_are_those_of_the_input(level: str, shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape), torch.randn(5, 7)
    made = linears(x, [Matrix(w)])
    assert made is not None
    torch.testing.assert_close(made[0], F.linear(x, w))


def test_an_input_may_be_strided(level: str) -> None:
    x, w = torch.randn(7, 3).T, torch.randn(5, 7)
    made = linears(x, [Matrix(w)])
    assert made is not None
    torch.testing.assert_close(made[0], F.linear(x, w))


def test_infinities_and_nans_come_through(level: str) -> None:
    x, w = torch.ones(1, 40, dtype=torch.bfloat16), torch.ones(3, 40, dtype=torch.bfloat16)
    w[0, 39], w[1, 0] = torch.inf, torch.nan
    made = linears(x, [Matrix(w)])
    assert made is not None
    torch.testing.assert_close(made[0], F.linear(x, w), equal_nan=True)


def quantized(kind: str, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_int8(w) if kind == "int8" else quantize_int4(w)


def numbers(kind: str, w: Matrix, columns: int, dtype: torch.dtype) -> torch.Tensor:
    assert w.scale is not None
    if kind == "int8":
        return (w.weight.float() * w.scale[..., None]).to(dtype)
    halves = w.weight.unflatten(-1, (-1, 32))
    levels = torch.cat((halves & 15, halves >> 4), dim=-1).float() - 8
    return (levels * w.scale.float()[..., None]).flatten(-2)[..., :columns].to(dtype)


KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])
# The vectors' 16 bits, and for bfloat16 the rounding of the result.
QUANTIZED_BOUND = {torch.float32: 2**-13, torch.bfloat16: 2**-8}


@KINDS
@DTYPES
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    M=st.integers(1, STEP_TOKENS),
    I=st.integers(1, 300),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    biased=st.booleans(),
    threads=st.integers(1, 3),
)
def test_quantised_weights_are_the_numbers_they_stand_for(
    level: str,
    kind: str,
    dtype: torch.dtype,
    M: int,
    I: int,
    sizes: list[int],
    biased: bool,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(M, I).to(dtype)
    maps = []
    for O in sizes:
        bias = torch.randn(O).to(dtype) if biased else None
        maps.append(Matrix(*quantized(kind, torch.randn(O, I)), bias))
    made = linears(x, maps)
    assert made is not None
    for y, m in zip(made, maps, strict=True):
        w = numbers(kind, m, I, torch.float64)
        products = x.double() @ w.T
        exact = products if m.bias is None else products + m.bias
        # Measured by what was summed: a sum can be near zero.
        size = torch.maximum(x.double().norm() * w.norm(dim=1).max(), exact.abs().max())
        assert float((y.double() - exact).abs().max() / size) <= QUANTIZED_BOUND[dtype]


@KINDS
def test_outliers_cost_their_own_group_alone(level: str, kind: str) -> None:
    x = torch.randn(1, 256)
    x[0, 3] = 1e6
    w = torch.randn(8, 256)
    w[:, :64] = 0
    m = Matrix(*quantized(kind, w))
    made = linears(x, [m])
    assert made is not None
    assert relative_error(made[0], x @ numbers(kind, m, 256, torch.float32).T) <= 1e-3


@KINDS
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_quantised_weights_do_not_hide_a_broken_input(level: str, kind: str, value: float) -> None:
    x = torch.zeros(2, 100)
    x[1, 70] = value
    made = linears(x, [Matrix(*quantized(kind, torch.randn(3, 100)))])
    assert made is not None
    assert made[0][0].tolist() == [0, 0, 0]
    assert made[0][1].isnan().all()


@KINDS
@DTYPES
@pytest.mark.parametrize("shape", [(3, 7, 64), (5, 1), (4, 100), (2, 3, 129)])
def test_widening_is_dequantising(
    level: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    m = Matrix(*quantized(kind, torch.randn(shape)))
    assert m.scale is not None
    made = widen(m, shape[-1], dtype)
    assert made is not None
    torch.testing.assert_close(made, numbers(kind, m, shape[-1], dtype), rtol=0, atol=0)


class Wrapped(torch.Tensor):
    """Any tensor that is more than one."""


W = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        (torch.randn(0, 8), W),
        (torch.randn(3, 0), torch.randn(4, 0)),
        (torch.randn(MOST_VECTORS["f32"] + 1, 8), W),
        (torch.randn(3, 8, dtype=torch.float64), W.double()),
        (torch.randn(3, 8, dtype=torch.float16), W.half()),
        (torch.randn(3, 8), W.bfloat16()),
        (torch.randn(3, 8), torch.randn(8, 4).T),
        (torch.randn(3, 8, requires_grad=True), W),
        (torch.randn(3, 8), torch.nn.Parameter(W)),
        (torch.randn(3, 8, device="meta"), W),
        (torch.randn(3, 8).as_subclass(Wrapped), W),
        (torch.randn(3, 8), W.clone().as_subclass(Wrapped)),
        (torch.randn(3, 7), W),
    ],
    ids=lambda tensor: f"{type(tensor).__name__} {tensor.dtype} {list(tensor.shape)}",
)
def test_it_leaves_the_rest_to_torch(level: str, x: torch.Tensor, w: torch.Tensor) -> None:
    assert linears(x, [Matrix(w)]) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_it_steps_aside_where_torch_is_watched(level: str) -> None:
    x, module = torch.randn(3, 8), Linear(8, 4)
    with torch.no_grad():
        expected = F.linear(x, module.weight, module.bias)
        with FlopCounterMode(display=False) as counter:
            module(x)
        assert counter.get_total_flops() == 2 * 3 * 8 * 4
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        mapped = torch.func.vmap(module)(x)
        torch.testing.assert_close(mapped, expected)
        traced = torch.jit.trace(module, x)
        assert "aten::linear" in str(traced.inlined_graph)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
    module(x).sum().backward()
    assert module.weight.grad is not None
