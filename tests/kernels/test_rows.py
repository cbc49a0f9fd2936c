import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quintet.kernels.rows import rms_norm, rotate, silu_mul
from support import relative_error

# A rounding of float32 sums; three of bfloat16.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 3 * 2**-8}
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=str)
EXAMPLES = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@DTYPES
@EXAMPLES
@given(rows=st.integers(1, 40), C=st.integers(1, 600), threads=st.integers(1, 3))
def test_rms_norm(level: str, dtype: torch.dtype, rows: int, C: int, threads: int) -> None:
    torch.set_num_threads(threads)
    x, w = (3 * torch.randn(rows, 1, C)).to(dtype), torch.randn(C).to(dtype)
    made = rms_norm(x, w, 1e-5)
    exact = F.rms_norm(x.double(), (C,), w.double(), 1e-5)
    assert made is not None
    assert made.dtype == dtype
    assert relative_error(made.double(), exact) <= BOUND[dtype]


def test_rms_norm_of_strided_and_broken_rows(level: str) -> None:
    x, w = torch.randn(5, 40, 3).transpose(1, 2), torch.randn(40)
    x[0, 0, 0] = torch.nan
    made = rms_norm(x, w, 1e-6)
    assert made is not None
    torch.testing.assert_close(made, F.rms_norm(x, (40,), w, 1e-6), equal_nan=True)


@DTYPES
@EXAMPLES
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 5),
    K=st.integers(1, 3),
    T=st.integers(1, 40),
    half=st.integers(1, 40),
    shared=st.booleans(),
    neighbours=st.booleans(),
    threads=st.integers(1, 3),
)
def test_rotate(
    level: str,
    dtype: torch.dtype,
    B: int,
    H: int,
    K: int,
    T: int,
    half: int,
    shared: bool,
    neighbours: bool,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    angles = torch.randn(1 if shared else B, T, 2 * half)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    parts = [torch.randn(B, T, n, 2 * half).to(dtype).transpose(1, 2) for n in (H, K)]
    if neighbours:
        # Those angles come in two halves that are the same.
        cos, sin = (torch.cat((x[..., :half], x[..., :half]), dim=-1) for x in (cos, sin))
    made = rotate((parts[0], parts[1]), cos, sin, neighbours=neighbours)
    assert made is not None
    for y, x in zip(made, parts, strict=True):
        if neighbours:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        left, right = x.double().chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1) * sin.double()[:, None]
        exact = x.double() * cos.double()[:, None] + turned
        assert y.shape == x.shape
        assert relative_error(y.double(), exact) <= BOUND[dtype]


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 4, 33), (70, 512)])
def test_silu_mul(level: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = (8 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    made = silu_mul(gate, up)
    assert made is not None
    assert relative_error(made.double(), F.silu(gate.double()) * up.double()) <= BOUND[dtype]


def test_silu_of_extremes(level: str) -> None:
    gate = torch.tensor([[-200.0, -100.0, -20.0, 0.0, 100.0, 1e30, torch.nan, torch.inf]])
    made = silu_mul(gate, torch.ones_like(gate))
    assert made is not None
    torch.testing.assert_close(made, F.silu(gate), equal_nan=True)


def test_what_learns_or_is_of_another_dtype_is_left_to_torch(level: str) -> None:
    x, w = torch.randn(2, 8), torch.randn(8)
    assert rms_norm(x.half(), w.half(), 1e-5) is None
    assert rms_norm(x.bfloat16(), w, 1e-5) is None
    learns = torch.randn(2, 8, requires_grad=True)
    assert rms_norm(learns, w, 1e-5) is None
    assert silu_mul(learns, x) is None
    cos = torch.randn(1, 3, 8)
    assert rotate((torch.randn(1, 2, 3, 8).bfloat16(),), cos, cos) is None
    assert rotate((torch.randn(1, 2, 4, 8),), cos, cos) is None
