"""Experts of every shape, in every way to hold a weight; and a token's, whoever else is there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from on_triton.experts import FORMATS, experts, mlp_by_steps, rounding
from quintet.triton.gated import gated

pytest.importorskip("triton", reason="Triton is made for Linux")
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=14, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    N=st.integers(1, 5),
    A=st.integers(1, 2),
    E=st.integers(2, 6),
    C=st.integers(1, 90),
    F=st.integers(1, 24),
)
@torch.no_grad()
def test_experts_of_any_shape(
    name: str, dtype: torch.dtype, N: int, A: int, E: int, C: int, F: int
) -> None:
    held = FORMATS[name]
    given = experts(CPU, sizes=(N, A, E, C, F), dtype=dtype, held=held)
    made, right = gated(**given), mlp_by_steps(**given, held=held)
    assert made is not None
    size = mlp_by_steps(**given, held=held, sizes=True).max()
    # Of two thousand drawn, the worst came to 1.7.
    assert (made - right).abs().max() <= 4 * rounding(dtype) * size


@pytest.mark.parametrize("mode", ["by id", "sorted, with QUINTET_BATCH_INVARIANT=1"])
@torch.no_grad()
def test_a_token_does_not_see_the_others(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode != "by id":
        monkeypatch.setenv("QUINTET_BATCH_INVARIANT", "1")
    given = dict(experts(CPU, sizes=(6, 1, 12, 72, 16), held=FORMATS["int8"]))
    together = gated(**given)
    alone = {name: given[name][4:5] for name in ("x", "indices", "shares")}
    one = gated(**{**given, **alone})
    assert together is not None
    assert one is not None
    assert torch.equal(together[4:5], one)


@torch.no_grad()
def test_what_kernels_cannot_read_is_left_to_others() -> None:
    given = dict(experts(CPU, sizes=(2, 1, 4, 32, 16), dtype=torch.float32))
    other = {**given, "x": given["x"].bfloat16()}
    across = {
        **given,
        "down": given["down"]._replace(weight=given["down"].weight.mT.contiguous().mT),
    }
    biased = {**given, "up": given["up"]._replace(bias=torch.zeros(16))}
    few = experts(CPU, sizes=(2, 1, 4, 32, 16), held=FORMATS["int8"])
    apart = {**given, "x": torch.stack((given["x"],) * 2, dim=-1)[..., 0]}
    for refused in (other, across, biased, apart, {**few, "x": few["x"].double()}):
        assert gated(**refused) is None
