"""Whatever the rules, a token goes to the experts that the definition chooses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.kernels.routing import Rules

pytest.importorskip("triton", reason="Triton is made for Linux")

from on_triton.routing import by_steps, logits, ordered
from quintet.triton.routing import choose

CPU = torch.device("cpu")


@st.composite
def rules(draw: st.DrawFn) -> tuple[int, Rules]:
    groups, each = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    kept = draw(st.integers(1, groups))
    active = draw(st.integers(2 if kept * each > 1 else 1, kept * each))
    sigmoid, normalise = draw(st.booleans()), draw(st.booleans()) and active > 1
    # A softmax is normalised or scaled, never both.
    scaling = draw(st.sampled_from([1.0, 2.5])) if sigmoid or not normalise else 1.0
    made = Rules(
        sigmoid=sigmoid,
        active=active,
        groups=groups,
        kept_groups=kept,
        ranked=2 if sigmoid else 1,
        normalise=normalise,
        scaling=scaling,
    )
    return groups * each, made


@given(rules())
@settings(max_examples=25)
@torch.no_grad()
def test_any_rules(told: tuple[int, Rules]) -> None:
    E, how = told
    inputs = logits(CPU, N=3, E=E, rules=how)
    made, right = ordered(choose, **inputs), ordered(by_steps, **inputs)
    assert made is not None
    assert right is not None
    assert torch.equal(made[0], right[0])
    torch.testing.assert_close(made[1], right[1], rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_scores_that_are_no_numbers_or_none_at_all_name_experts_there_are() -> None:
    how = Rules(sigmoid=True, active=2, groups=3, kept_groups=2, ranked=2)
    x = torch.tensor([[torch.nan] * 6, [-torch.inf] * 6, [0.0, torch.nan, 1, 2, 3, 4]])
    made = choose(x, how, torch.zeros(6))
    assert made is not None
    assert made[0].tolist()[:2] == [[0, 1], [0, 1]]
    assert made[0][2, 0] == 1
    assert bool(made[1][2].isnan().any())


@torch.no_grad()
def test_what_it_was_not_written_for_is_left_to_the_definition() -> None:
    x, how = torch.randn(2, 6), Rules(active=2, groups=3, kept_groups=2)
    assert choose(x, how) is not None
    assert choose(x.double(), how) is None
    assert choose(x, Rules(active=5, groups=3, kept_groups=2)) is None
    assert choose(x, Rules(active=1, groups=4)) is None
    assert choose(x, how, torch.zeros(3)) is None
    assert choose(torch.randn(1, 2048), Rules(active=1)) is None
