"""Nothing that does not fit crosses into C++: either side refuses it, and PyTorch judges."""

import pytest
import torch
from torch import Tensor

from operations import CASES, Case, assert_alike, bound, mutants, outcome
from quintet.kernels import calls
from quintet.kernels.calls import Call
from quintet.kernels.native import available

# Whether something fits is found out by what is the same on every instruction set.
ANY_LEVEL = pytest.mark.skipif(not available(), reason="there are no kernels on this machine")
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@EACH
def test_what_fits_is_computed_by_a_kernel(
    level: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    real = Call.run
    monkeypatch.setattr(
        Call, "run", lambda call, name: (ran.append(made := real(call, name)), made)[1]
    )
    with torch.no_grad():
        case.run(**case.inputs)
    assert ran
    assert all(ran)


@pytest.mark.filterwarnings("ignore")
@ANY_LEVEL
@EACH
@torch.no_grad()
def test_whatever_comes_is_what_it_is_without_kernels(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, x in case.inputs.items():
        # Made twice, as some inputs are written to.
        for (label, one), (_, two) in zip(mutants(x), mutants(x), strict=True):
            fresh = {other: value.clone() for other, value in case.inputs.items()}
            made = outcome(case, {**case.inputs, **fresh, name: one})
            fresh = {other: value.clone() for other, value in case.inputs.items()}
            with monkeypatch.context() as without:
                without.setattr(calls, "available", lambda: False)
                expected = outcome(case, {**case.inputs, **fresh, name: two})
            assert_alike(made, expected, f"{name} {label}", bound(case))


@ANY_LEVEL
@EACH
@torch.no_grad()
def test_the_other_side_refuses_what_it_is_not_lent(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this side lets through: less memory, other sizes, other fields."""
    given: list[tuple[str, list[int], list[Tensor]]] = []
    real = Call.run

    def watched(call: Call, name: str) -> bool:
        given.append((name, list(call.fields), list(call.tensors)))
        return real(call, name)

    monkeypatch.setattr(Call, "run", watched)
    case.run(**case.inputs)

    def runs(name: str, fields: list[int]) -> bool:
        call = Call()
        call.fields = fields
        return real(call, name)

    for name, fields, tensors in given:
        assert runs(name, fields)
        assert not runs(name, [*fields, 0])
        assert not runs(name, fields[:-1])
        addresses = {x.data_ptr() for x in tensors}
        for i, field in enumerate(fields):
            if field in addresses:
                assert not runs(name, [*fields[:i], 0, *fields[i + 1 :]]), f"{name} {i}"
                less = [*fields[: i + 1], fields[i + 1] - 1, *fields[i + 2 :]]
                assert not runs(name, less), f"{name} {i}"
