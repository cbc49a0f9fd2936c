import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.kernels.matrix import Matrix
from quintet.kernels.product import gated_products, products
from quintet.layers.linear import Linear
from quintet.layers.mlp import GatedMLP
from support import relative_error

BOUND = 2**-8


def padded(O: int, I: int) -> Tensor:
    """Return a matrix beside which lies what must not be read."""
    wide = torch.full((O, I + 3), torch.nan, dtype=torch.bfloat16)
    wide[:, :I].normal_()
    return wide[:, :I]


def exact(x: Tensor, matrix: Matrix) -> Tensor:
    bias = None if matrix.bias is None else matrix.bias.double()
    return F.linear(x.double(), matrix.weight.double(), bias)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    M=st.integers(1, 60),
    I=st.integers(1, 200),
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    biased=st.booleans(),
    threads=st.integers(1, 3),
)
def test_it_is_the_sum_of_products(
    level: str, M: int, I: int, sizes: list[int], biased: bool, threads: int
) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(M, I + 1).bfloat16()[:, :I]
    maps = [
        Matrix(padded(O, I), None, torch.randn(O).bfloat16() if biased else None) for O in sizes
    ]
    made = products(x, maps)
    assert made is not None
    for y, matrix in zip(made, maps, strict=True):
        assert y.dtype == torch.bfloat16
        assert relative_error(y.double(), exact(x, matrix)) <= BOUND


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    M=st.integers(1, 60),
    I=st.integers(1, 200),
    width=st.integers(1, 100),
    threads=st.integers(1, 3),
)
def test_the_gate_is_applied(level: str, M: int, I: int, width: int, threads: int) -> None:
    torch.set_num_threads(threads)
    x, gate, up = torch.randn(M, I).bfloat16(), padded(width, I), padded(width, I)
    made = gated_products(x, Matrix(gate), Matrix(up))
    assert made is not None
    true = F.silu(exact(x, Matrix(gate))) * exact(x, Matrix(up))
    assert relative_error(made.double(), true) <= BOUND


@pytest.mark.parametrize(("M", "O", "I"), [(300, 700, 1024), (41, 130, 5000), (25, 2100, 64)])
def test_matrices_that_fill_the_caches(level: str, M: int, O: int, I: int) -> None:
    torch.set_num_threads(2)
    x, matrix = torch.randn(M, I).bfloat16(), Matrix(padded(O, I))
    made = products(x, [matrix])
    assert made is not None
    assert relative_error(made[0].double(), exact(x, matrix)) <= BOUND


def test_a_row_does_not_depend_on_the_others_or_on_threads(level: str) -> None:
    x, matrix = torch.randn(50, 77).bfloat16(), Matrix(padded(300, 77))
    torch.set_num_threads(1)
    one = products(x, [matrix])
    torch.set_num_threads(3)
    many, few = products(x, [matrix]), products(x[:7], [matrix])
    assert one is not None
    assert many is not None
    assert few is not None
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[0][:7], few[0])


def test_infinities_and_nans_come_through(level: str) -> None:
    x, w = torch.ones(40, 40).bfloat16(), torch.ones(3, 40).bfloat16()
    w[0, 39], w[1, 0] = torch.inf, torch.nan
    made = products(x, [Matrix(w)])
    assert made is not None
    torch.testing.assert_close(made[0], F.linear(x, w), equal_nan=True)


def test_shapes_are_those_of_the_input(level: str) -> None:
    x = torch.randn(2, 50, 3, 8).bfloat16().transpose(1, 2)
    matrix = Matrix(padded(5, 8))
    made = products(x, [matrix])
    assert made is not None
    assert made[0].shape == (2, 3, 50, 5)
    assert relative_error(made[0].double(), exact(x, matrix)) <= BOUND


def test_layers_of_many_tokens_use_it(level: str) -> None:
    x = torch.randn(1, 64, 32).bfloat16()
    linear, mlp = Linear(32, 48).bfloat16(), GatedMLP(32, 80, act="silu").bfloat16()
    with torch.inference_mode():
        made = products(x, [linear.matrix()])
        assert made is not None
        assert torch.equal(linear(x), made[0])
        inside = gated_products(x, mlp.gate_proj.matrix(), mlp.up_proj.matrix())
        assert inside is not None
        assert torch.equal(mlp(x), mlp.down_proj(inside))
        wide = x.double()
        gate = F.silu(F.linear(wide, mlp.gate_proj.weight.double()))
        true = F.linear(
            gate * F.linear(wide, mlp.up_proj.weight.double()), mlp.down_proj.weight.double()
        )
        assert relative_error(mlp(x).double(), true) <= 3 * BOUND


def test_it_leaves_to_torch_what_it_is_not_for(level: str) -> None:
    x, w = torch.randn(40, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    assert products(x, [Matrix(w)]) is not None
    assert products(x.float(), [Matrix(w.float())]) is None
    assert products(x, [Matrix(w.float())]) is None
    assert products(x[:0], [Matrix(w)]) is None
    assert products(x, [Matrix(w.T.contiguous().T)]) is None
    assert products(x, [Matrix(w.clone().requires_grad_())]) is None
    assert gated_products(x, Matrix(w, None, torch.zeros(6)), Matrix(w)) is None
    assert gated_products(x, Matrix(w), Matrix(w[:5])) is None
