"""Whatever sequences a step has, attention over pages is what its definition makes of them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.ops import paged

pytest.importorskip("triton", reason="Triton is made for Linux")

from on_triton.attention import BF16, F32, Scene, inputs
from quintet.triton.attention import attend_pages

CPU = torch.device("cpu")


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    K, G = draw(st.sampled_from([(1, 1), (1, 5), (2, 1), (2, 3), (1, 20)]))
    counts = draw(st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(any))
    page = draw(st.sampled_from([None, 0, 1, 4, 16]))
    starts = [0 if page == 0 else draw(st.integers(0, 30)) for _ in counts]
    longest = None if page == 0 else draw(st.sampled_from([None, 60, 600]))
    shared, parts = draw(st.booleans()), draw(st.integers(1, 2))
    size = st.sampled_from([4, 8, 12, 20, 32, 36])
    return Scene(
        tokens=list(zip(counts, starts, strict=True)),
        heads=(K * G, K),
        sizes=tuple(draw(size) for _ in range(parts + (not shared))),
        page=page,
        dtype=draw(st.sampled_from([F32, BF16])),
        bits=draw(st.sampled_from([None, None, 8, 6, 4])),
        window=draw(st.none() | st.integers(1, 50)),
        nowhere=draw(st.none() | st.integers(0, len(counts) - 1)),
        longest=longest,
        shared=shared,
    )


@given(scenes())
@settings(max_examples=25)
@torch.no_grad()
def test_any_sequences(scene: Scene) -> None:
    given_ = dict(inputs(CPU, scene=scene))
    made, right = attend_pages(**given_), paged.attend_pages.definition(**given_)
    assert made is not None
    assert made.dtype == right.dtype
    bound = 1e-5 if scene.dtype == F32 else 2**-6
    assert bool(((made - right).abs() <= bound * right.abs().max()).all())


@pytest.mark.parametrize(
    "change",
    [
        lambda g: {"q": tuple(x.transpose(0, 2).contiguous().transpose(0, 2) for x in g["q"])},
        lambda g: {"q": tuple(x.double() for x in g["q"])},
        lambda g: {"q": tuple(x[:, :3] for x in g["q"])},
        lambda g: {"k": (g["k"][0].double(),)},
    ],
    ids=["steps between numbers", "float64", "heads that do not divide", "another dtype"],
)
@torch.no_grad()
def test_what_it_was_not_written_for_is_left_to_the_definition(change: Any) -> None:
    known = dict(inputs(CPU, scene=Scene([(1, 5), (1, 9)])))
    assert attend_pages(**known) is not None
    assert attend_pages(**known | change(known)) is None
