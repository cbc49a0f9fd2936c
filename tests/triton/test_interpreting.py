"""The interpreter, as its faster parts here replace its own, still sees what it saw."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux")
if torch.cuda.device_count():
    pytest.skip("kernels are not interpreted where there is a GPU", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

LIMITS = {torch.int32: 2**31, torch.int16: 2**15}


@triton.jit
def _add(one, other, into):  # type: ignore[no-untyped-def]
    tl.store(into, tl.load(one) + tl.load(other))


@triton.jit
def _multiply(one, other, into):  # type: ignore[no-untyped-def]
    tl.store(into, tl.load(one) * tl.load(other))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_integers_that_do_not_fit_are_refused(dtype: torch.dtype) -> None:
    half = LIMITS[dtype] // 2
    made = torch.zeros(1, dtype=dtype)

    def of(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=dtype)

    _add[(1,)](of(half), of(half - 1), made)
    assert int(made) == 2 * half - 1
    for kernel, name, other in ((_add, "add", half), (_multiply, "mul", -4)):
        with pytest.raises(InterpreterError, match=f"overflow detected for operation {name}"):
            kernel[(1,)](of(half), of(other), made)
