"""Whatever a kernel is given, it makes what its definition makes: on a GPU, or interpreted."""

import pytest
import torch

from on_triton.cases import Case, every_case, tensors_of

pytest.importorskip("triton", reason="Triton is made for Linux")
CPU = torch.device("cpu")
# Where kernels run: in Triton's interpreter where there is no GPU.
THERE = torch.device("cuda") if torch.cuda.device_count() else CPU


@pytest.mark.parametrize("case", every_case(), ids=lambda case: case.name)
def test_a_kernel_computes_what_its_definition_does(case: Case) -> None:
    with torch.no_grad():
        right = tensors_of(case.definition(**case.inputs(CPU)))
        made = [x.cpu() for x in tensors_of(case.kernel(**case.inputs(THERE)))]
    assert made, "it does not apply"
    for one, other in zip(made, right, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if not other.is_floating_point():
            assert torch.equal(one, other)
        elif other.numel():
            numbers = other.isfinite()
            assert torch.equal(one.isfinite(), numbers)
            one, other = (x.double()[numbers] for x in (one, other))
            largest = other.abs().max() if len(other) else 0
            assert bool(((one - other).abs() <= case.tolerance * largest).all())
