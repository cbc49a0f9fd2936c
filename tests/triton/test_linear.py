"""Maps of few rows by weights in every format are what widened weights make."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from on_triton.experts import widened
from on_triton.linear import HELD, maps
from quintet.triton.linear import MOST, linears

pytest.importorskip("triton", reason="Triton is made for Linux")
CPU = torch.device("cpu")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
# Of so many roundings of what does not cancel: a weight is rounded, and so is the result.
ROUNDINGS = 8


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(HELD)),
    dtype=st.sampled_from(sorted(UNIT, key=str)),
    lead=st.sampled_from([(1,), (2,), (1, 3), (17,), (2, 20)]),
    O=st.integers(1, 70),
    I=st.integers(1, 150),
    bias=st.booleans(),
)
@torch.no_grad()
def test_rows_by_any_weight(
    name: str, dtype: torch.dtype, lead: tuple[int, ...], O: int, I: int, bias: bool
) -> None:
    given_ = maps(CPU, lead=lead, sizes=(O, I), name=name, dtype=dtype, bias=bias)
    made = linears(**given_)
    assert made is not None
    x = given_["x"].double()
    for y, matrix in zip(made, given_["maps"], strict=True):
        assert (y.dtype, y.shape[:-1]) == (dtype, x.shape[:-1])
        weight = widened(matrix, HELD[name], I, torch.float32).double()
        b = torch.zeros((), dtype=torch.float64) if matrix.bias is None else matrix.bias.double()
        largest = x.abs() @ weight.abs().T + b.abs() + torch.finfo(dtype).tiny
        off = (y - (x @ weight.T + b)).abs() / largest
        assert float(off.max()) <= ROUNDINGS * UNIT[dtype]


@torch.no_grad()
def test_a_row_does_not_see_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUINTET_BATCH_INVARIANT", "1")
    given_ = maps(CPU, lead=(40,), sizes=(33, 70), name="int8", dtype=torch.bfloat16)
    together, alone = linears(**given_), linears(given_["x"][33:34], given_["maps"])
    assert together is not None
    assert alone is not None
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[33:34], other)


@torch.no_grad()
def test_what_it_was_not_written_for_is_left_to_the_definition() -> None:
    given_ = maps(CPU, lead=(3,), sizes=(8, 70), name="int8", dtype=torch.float32)
    x, (first, second) = given_["x"], given_["maps"]
    apart = first._replace(weight=torch.stack((first.weight,) * 2, dim=-1)[..., 0])
    plain = first._replace(weight=first.weight.float(), scale=None)
    for one in (apart, plain, first._replace(bias=torch.zeros(9))):
        assert linears(x, [second, one]) is None
    for rows in (x.double(), x[:, :-1], x.repeat(MOST, 1), torch.stack((x, x), dim=-1)[..., 0]):
        assert linears(rows, [first]) is None
