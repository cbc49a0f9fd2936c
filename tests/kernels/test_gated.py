import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quintet.kernels.gated import gated
from quintet.kernels.matrix import Matrix
from quintet.ops.quantized import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8

BOUND = {torch.float32: 2**-12, torch.bfloat16: 2**-6}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=str)
KINDS = pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
EXAMPLES = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def held(kind: str, w: torch.Tensor, dtype: torch.dtype) -> tuple[Matrix, torch.Tensor]:
    """A weight as kernels read it, and the numbers it stands for."""
    if kind == "plain":
        return Matrix(w.to(dtype)), w.to(dtype).double()
    if kind == "int8":
        q, scale = quantize_int8(w)
        return Matrix(q, scale), dequantize_int8(q, scale, torch.float64)
    q, scale = quantize_int4(w)
    return Matrix(q, scale), dequantize_int4(q, scale, w.shape[-1], torch.float64)


@KINDS
@DTYPES
@EXAMPLES
@given(
    shape=st.sampled_from([(1,), (1, 1), (2, 3), (12,)]),
    C=st.integers(1, 150),
    width=st.integers(1, 150),
    threads=st.integers(1, 3),
)
def test_an_mlp(
    level: str,
    kind: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    C: int,
    width: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(*shape, C).to(dtype)
    sizes = [(width, C), (width, C), (C, width)]
    (gate, g), (up, u), (down, d) = (
        held(kind, torch.randn(size) / size[1] ** 0.5, dtype) for size in sizes
    )
    made = gated(x, gate, up, down)
    assert made is not None
    assert made.dtype == dtype
    hidden = F.silu(x.double() @ g.T) * (x.double() @ u.T)
    # A sum can be near zero: measured by what was summed.
    size = _size(x, g, u, d)
    assert float((made.double() - hidden @ d.T).abs().max()) <= BOUND[dtype] * size


def _size(x: torch.Tensor, g: torch.Tensor, u: torch.Tensor, d: torch.Tensor) -> float:
    wide = x.double().abs()
    hidden = (wide @ g.abs().T) * (wide @ u.abs().T)
    return max(float((hidden @ d.abs().T).max()), 1e-9)


@KINDS
@DTYPES
@EXAMPLES
@given(
    N=st.integers(1, 12),
    A=st.integers(1, 4),
    E=st.integers(4, 9),
    C=st.integers(1, 100),
    width=st.integers(1, 100),
    threads=st.integers(1, 3),
)
def test_the_experts_of_each_token(
    level: str,
    kind: str,
    dtype: torch.dtype,
    N: int,
    A: int,
    E: int,
    C: int,
    width: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(N, C).to(dtype)
    indices = torch.rand(N, E).topk(A).indices
    shares = torch.rand(N, A)
    both, gu = held(kind, torch.randn(E, 2 * width, C) / C**0.5, dtype)
    down, d = held(kind, torch.randn(E, C, width) / width**0.5, dtype)
    weights = both.weight.chunk(2, dim=1)
    scales = (None, None) if both.scale is None else both.scale.chunk(2, dim=1)
    gate, up = (Matrix(*half) for half in zip(weights, scales, strict=True))
    made = gated(x, gate, up, down, indices, shares)
    assert made is not None
    exact = torch.zeros(N, C, dtype=torch.float64)
    size = 1e-9
    for n in range(N):
        for a in range(A):
            e = int(indices[n, a])
            g, u = gu[e].chunk(2)
            token = x[n].double()
            exact[n] += shares[n, a].double() * (d[e] @ (F.silu(g @ token) * (u @ token)))
            size = max(size, A * _size(token, g, u, d[e]))
    assert float((made.double() - exact).abs().max()) <= BOUND[dtype] * size


def test_what_it_cannot_do_is_left_to_torch(level: str) -> None:
    x, g, d = torch.randn(2, 8), torch.randn(5, 8), torch.randn(8, 5)
    assert gated(x, Matrix(g), Matrix(g), Matrix(d)) is not None
    assert gated(x[:0], Matrix(g), Matrix(g), Matrix(d)) is None
    assert gated(torch.randn(100, 8), Matrix(g), Matrix(g), Matrix(d)) is None
    assert gated(x, Matrix(g, None, torch.randn(5)), Matrix(g), Matrix(d)) is None
    assert gated(x, Matrix(g), Matrix(g.bfloat16()), Matrix(d)) is None
    assert gated(x, Matrix(g), Matrix(g), Matrix(d.T)) is None
    assert gated(x, Matrix(g.clone().requires_grad_()), Matrix(g), Matrix(d)) is None
    assert gated(x.half(), Matrix(g.half()), Matrix(g.half()), Matrix(d.half())) is None


@pytest.mark.parametrize("wrong", [-1, 3, 2**40, -(2**40)])
def test_experts_that_do_not_exist_are_refused(level: str, wrong: int) -> None:
    x, shares = torch.randn(2, 8), torch.ones(2, 2)
    gate, down = Matrix(torch.randn(3, 5, 8)), Matrix(torch.randn(3, 8, 5))
    indices = torch.tensor([[0, 1], [2, 0]])
    assert gated(x, gate, gate, down, indices, shares) is not None
    indices[1, 1] = wrong
    assert gated(x, gate, gate, down, indices, shares) is None


def test_choices_have_to_be_those_of_the_tokens(level: str) -> None:
    x, indices = torch.randn(2, 8), torch.zeros(2, 3, dtype=torch.long)
    gate, down = Matrix(torch.randn(3, 5, 8)), Matrix(torch.randn(3, 8, 5))
    assert gated(x, gate, gate, down, indices, torch.ones(2, 3)) is not None
    assert gated(x, gate, gate, down, indices, torch.ones(2, 2)) is None
    assert gated(x[:1], gate, gate, down, indices, torch.ones(2, 3)) is None
