"""Vectors in few bits come back to within half a step, and take the bytes they say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.errors import InputError
from quintet.ops.vector_codes import BITS, VectorCode


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(size=st.integers(1, 40), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_each_number_is_off_by_half_a_step_at_the_most(
    bits: int, size: int, scale: float, seed: int
) -> None:
    x = torch.randn(3, 2, 4 * size, generator=torch.Generator().manual_seed(seed)) * scale
    code = VectorCode(bits)
    codes, steps = code.encode(x)
    assert (codes.dtype, codes.shape[-1]) == (torch.uint8, 4 * size * bits // 8)
    assert steps.shape == (3, 2, 1)
    decoded = code.decode(codes, steps, torch.float32)
    # The scale is rounded to 8 bits, by which the largest number may be cut.
    cut = 2**-8 * x.abs().amax(dim=-1, keepdim=True)
    assert bool(((decoded - x).abs() <= steps.float() / 2 + cut).all())


@pytest.mark.parametrize("bits", BITS)
def test_every_code_comes_back_as_itself(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    x = torch.arange(-top, top + 1, dtype=torch.float32)
    x = torch.cat((x, torch.zeros(-len(x) % 4)))
    for shuffled in (x, x.flip(0), x[torch.randperm(len(x))]):
        code = VectorCode(bits)
        assert torch.equal(code.decode(*code.encode(shuffled), torch.float32), shuffled)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_and_single_peaks(bits: int, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 8, dtype=dtype)
    x[1, 5] = -3.0
    code = VectorCode(bits)
    decoded = code.decode(*code.encode(x), dtype)
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, x, rtol=2**-8, atol=0.0)


def test_what_cannot_be_coded_is_named() -> None:
    with pytest.raises(InputError, match=r"5 bits.* 8, 6 or 4"):
        VectorCode(5)
    with pytest.raises(
        InputError, match=r"6 numbers cannot be kept in 6 bits.*multiple of 4; use 8"
    ):
        VectorCode(6).encode(torch.zeros(2, 6))
    with pytest.raises(InputError, match="3 numbers cannot be kept in 4 bits"):
        VectorCode(4).encode(torch.zeros(3))
