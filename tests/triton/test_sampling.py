"""A draw in one launch takes the token that the steps take by the same number."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is made for Linux")

from on_triton.sampling import by_steps, rows
from quintet.backends import REGISTRY
from quintet.generation.choice import Chosen, TokenChoice
from quintet.generation.processors import warpers
from quintet.generation.processors.base import LogitsWarper
from quintet.triton.backend import BACKEND
from quintet.triton.sampling import draw

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"temperature": None, "top_k": None, "top_p": None, "min_p": None}


@given(
    V=st.sampled_from([1, 2, 7, 40, 300, 4200]),
    coarse=st.booleans(),
    temperature=st.none() | st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.01, 0.99),
    min_p=st.none() | st.floats(0.001, 0.3),
)
@settings(max_examples=15)
def test_any_options(V: int, **options: Any) -> None:
    given_ = dict(rows(CPU, shape=(2, V), **options))
    made, right = draw(**given_), by_steps(**given_)
    assert made is not None
    assert torch.equal(made[1], right[1])
    if not torch.equal(made[0], right[0]):
        # A number on the border between two tokens, as sums of another order have it.
        moved = [by_steps(**{**given_, "u": given_["u"] + by}) for by in (-1e-6, 1e-6)]
        for row, token in enumerate(made[0].tolist()):
            assert token in {int(one[0][row]) for one in (right, *moved)}


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.0}, {"top_p": 0.5}], ids=str)
def test_what_is_forbidden_is_not_drawn(u: float, options: dict[str, Any]) -> None:
    scores = torch.tensor([[-math.inf, 1.0, -math.inf, 1.0, -200.0], [0.0, -0.0, 0.0, -9.0, 0.0]])
    given_ = {**PLAIN, **options, "scores": scores, "u": torch.full((2, 1), u)}
    made, right = draw(**given_), by_steps(**given_)
    assert made is not None
    assert torch.equal(made[0], right[0])


def test_a_row_that_has_none_to_take_is_told_by_its_largest_score() -> None:
    scores = torch.zeros(4, 5)
    scores[0, 2], scores[1, 3], scores[2] = math.nan, math.inf, -math.inf
    made = draw(scores, torch.full((4, 1), 0.5), **{**PLAIN, "top_p": 0.5, "top_k": 3})
    assert made is not None
    assert made[1].isnan().tolist() == [True, False, False, False]
    assert made[1][1:].tolist() == [math.inf, -math.inf, 0.0]
    assert all(0 <= token < 5 for token in made[0].tolist())


def test_a_choice_draws_so_where_a_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    g, scores = torch.Generator().manual_seed(1), torch.randn(2, 50)
    u = torch.rand(2, 1, generator=g)
    three: list[LogitsWarper] = [
        warpers.TemperatureLogitsWarper(0.8),
        warpers.TopKLogitsWarper(20),
        warpers.TopPLogitsWarper(0.9),
    ]
    choice = TokenChoice(three, do_sample=True)
    right = choice.launch_taking(choice.warped(scores), u=u)
    with REGISTRY.registered(BACKEND):
        asked: list[int] = []

        def taken(*given: Any, **more: Any) -> Any:
            asked.append(1)
            return Chosen(torch.zeros(2, dtype=torch.long), right.best)

        monkeypatch.setattr(TokenChoice, "launch_taking", taken)
        made = choice.launch(scores, u=u)
        assert not asked
        assert torch.equal(made.tokens, right.tokens)
        others: list[list[LogitsWarper]] = [
            [warpers.TypicalLogitsWarper(0.5)],
            [three[1], three[0]],
            [warpers.TopPLogitsWarper(0.9, min_tokens_to_keep=2)],
            [warpers.TopKLogitsWarper(5, filter_value=-9.0)],
            [three[1], three[1]],
        ]
        for other in others:
            TokenChoice(other, do_sample=True).launch(scores, u=u)
    assert len(asked) == len(others)
