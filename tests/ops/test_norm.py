"""RMSNorm in float32, with the weight applied after rounding."""

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from quintet.ops.norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 5, 64), (2, 0, 8)], ids=str)
def test_equals_transformers_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    theirs = Qwen2RMSNorm(shape[-1], eps=1e-6).to(dtype)
    torch.nn.init.normal_(theirs.weight).requires_grad_(False)
    x = (3 * torch.randn(shape)).to(dtype)
    # Kernels, and what learns, sum in another order.
    ours = rms_norm.definition(x, theirs.weight, 1e-6)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs(x))


def test_equals_the_formula_in_float64() -> None:
    x, weight = torch.randn(4, 33), torch.randn(33)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e15], ids=str)
def test_stays_finite_where_a_square_would_not_in_half_precision(scale: float) -> None:
    x = (torch.ones(1, 16) * scale).to(torch.bfloat16)
    y = rms_norm(x, torch.ones(16, dtype=torch.bfloat16), 1e-6)
    assert y.isfinite().all()
    assert float(y.abs().max()) <= 1.01
