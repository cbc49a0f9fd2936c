"""Whatever tokens a step has, each is rotated, and what is kept of it lies in its slot alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops import keeping as ops

pytest.importorskip("triton", reason="Triton is made for Linux")

from on_triton import attention
from on_triton.keeping import BF16, F16, F32, Scene, inputs, outcome
from quintet.triton.keeping import rotate_and_keep

CPU = torch.device("cpu")
UNIT = {F32: 2.0**-24, BF16: 2.0**-9, F16: 2.0**-11}
# Of so many roundings of what does not cancel; of five hundred scenes, the worst had 1.7.
ROUNDINGS = 4


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    K, G = draw(st.sampled_from([(1, 1), (1, 5), (2, 3)]))
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any))
    size = st.sampled_from([2, 6, 16, 20])
    where = attention.Scene(
        tokens=[(count, draw(st.integers(0, 30))) for count in counts],
        heads=(K * G, K),
        sizes=(draw(size), draw(st.sampled_from([1, 12, 16, 33]))),
        page=draw(st.sampled_from([None, 1, 4, 16])),
        dtype=draw(st.sampled_from([F32, BF16, F16])),
        nowhere=draw(st.none() | st.integers(0, len(counts) - 1)),
        spare=draw(st.sampled_from([0, 0, 2])),
    )
    return Scene(where, normed=draw(st.booleans()), interleaved=draw(st.booleans()))


def doubled(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(doubled(one) for one in x)
    return x.double() if isinstance(x, Tensor) else x


@given(scenes())
@settings(max_examples=25)
@torch.no_grad()
def test_any_tokens(scene: Scene) -> None:
    given_ = dict(inputs(CPU, scene=scene))
    made = outcome(rotate_and_keep, **given_)
    wide = {name: x if name == "pages" else doubled(x) for name, x in given_.items()}
    right = outcome(ops.rotate_and_keep.definition, **wide)
    assert made is not None
    assert right is not None
    unit = UNIT[scene.where.dtype]
    for one, other, size in zip(made, right, sizes(wide), strict=True):
        assert one.dtype == scene.where.dtype
        assert torch.equal(one.isnan(), other.isnan())
        off = (one.double() - other).abs() / (unit * size + 1e-30)
        assert float(off.nan_to_num(0).max()) <= ROUNDINGS


def sizes(wide: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return how large results may be if nothing cancels in the two products that they sum."""
    sin, half = wide["sin"].abs(), wide["q"].shape[-1] // 2
    large = {name: wide[name].abs() for name in ("q", "k", "other", "cos")}
    # The first of a pair is left·cos - right·sin, the second right·cos + left·sin.
    low, high = (
        outcome(ops.rotate_and_keep.definition, **{**wide, **large, "sin": s}) for s in (-sin, sin)
    )
    assert low is not None
    assert high is not None
    turned, keys = (
        torch.cat((one[..., :half], other[..., half:]), dim=-1)
        for one, other in zip(low[:2], high[:2], strict=True)
    )
    return turned.abs(), keys.abs(), low[2].abs()


@pytest.mark.parametrize(
    "change",
    [
        lambda g: {"q": g["q"].double()},
        lambda g: {"other": g["other"][:, :1]},
        lambda g: {"cos": g["cos"][:1]},
        lambda g: {"memory": tuple(x.double() for x in g["memory"])},
        lambda g: {"memory": g["memory"][::-1]},
        lambda g: {"norm": (torch.ones(4), 1e-6)},
    ],
    ids=["float64", "fewer heads", "angles of all", "wide memory", "changed over", "a short norm"],
)
@torch.no_grad()
def test_what_it_was_not_written_for_is_left_to_the_definition(change: Any) -> None:
    where = attention.Scene([(1, 5), (1, 9)], sizes=(16, 12))
    known = dict(inputs(CPU, scene=Scene(where)))
    assert rotate_and_keep(**known | change(known)) is None
    assert rotate_and_keep(**known) is not None
