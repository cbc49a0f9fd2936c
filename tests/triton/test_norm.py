"""Rows of every length, dtype and step are normalised as the definition does it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.ops import norm as ops

pytest.importorskip("triton", reason="Triton is made for Linux")

from quintet.triton.norm import rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of so many roundings; of eight hundred drawn, the worst had 5.3, of a sum in float32.
ROUNDINGS = 8


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(DTYPES),
    lead=st.sampled_from([(), (1,), (3,), (2, 3)]),
    C=st.integers(1, 300),
    step=st.integers(1, 2),
    beside=st.integers(0, 3),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
    eps=st.sampled_from([1e-6, 1e-2]),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_any_rows(
    dtype: torch.dtype,
    lead: tuple[int, ...],
    C: int,
    step: int,
    beside: int,
    size: float,
    eps: float,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    # A slice of something wider, whose numbers are beside each other or not.
    wide = (size * torch.randn(*lead, step * C + beside, generator=g)).to(dtype)
    x, weight = wide[..., : step * C : step], (torch.rand(C, generator=g) + 0.5).to(dtype)
    made = rms_norm(x, weight, eps)
    assert made is not None
    assert (made.dtype, made.shape) == (dtype, x.shape)
    right = ops.rms_norm.definition(x.double(), weight.double(), eps)
    # What is as small as the smallest numbers of float16 is rounded to whole ones of these.
    numbers = torch.finfo(dtype)
    rounding = numbers.eps / 2 * right.abs().clamp(min=numbers.smallest_normal)
    off = (made.double() - right).abs() / rounding
    assert float(off.max()) <= ROUNDINGS
