"""Columns make up for what others lost, as the paper says."""

import pytest
import torch
from torch import Tensor

from quintet.errors import InputError
from quintet.ops.error_feedback import DAMPING
from quintet.ops.group_fit import quantize_groups
from quintet.ops.groups import widen_groups

KINDS = {
    "offsets": {"group": 32, "offset": True},
    "table": {"group": 32, "iq4": True},
    "by 64": {"group": 64, "dtype": torch.bfloat16},
}


def inputs(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs that go together: of a few directions, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, columns // 4, generator=generator)
    mixed = few @ torch.randn(columns // 4, columns, generator=generator)
    return mixed + 0.3 * torch.randn(rows, columns, generator=generator)


def rounded(weight: Tensor, gram: Tensor | None, **kind: object) -> Tensor:
    parts = quantize_groups(weight, 4, gram=gram, **kind)  # type: ignore[arg-type]
    return widen_groups(*parts, weight.shape[1], iq4="iq4" in kind)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("columns", [128, 100])
def test_what_a_matrix_computes_of_such_inputs_changes_less(
    kind: dict[str, object], columns: int
) -> None:
    weight, x = torch.randn(40, columns), inputs(600, columns)
    before = (x @ (rounded(weight, None, **kind) - weight).T).square().mean()
    after = (x @ (rounded(weight, x.T @ x, **kind) - weight).T).square().mean()
    assert after < 0.6 * before


@pytest.mark.parametrize("kind", [KINDS["offsets"], KINDS["table"]], ids=["offsets", "table"])
def test_inputs_that_have_nothing_to_do_with_each_other_change_nothing(
    kind: dict[str, object],
) -> None:
    weight = torch.randn(9, 96)
    assert torch.equal(rounded(weight, 3.0 * torch.eye(96), **kind), rounded(weight, None, **kind))


def test_a_weight_on_its_grid_stays() -> None:
    weight = rounded(torch.randn(16, 64), None, group=32, offset=True)
    x = inputs(200, 64)
    assert torch.equal(rounded(weight, x.T @ x, group=32, offset=True), weight)


def test_it_is_what_the_paper_says() -> None:
    """Eqs. 2 and 3, column by column with the inverse itself, in float64."""
    weight, x = torch.randn(7, 64), inputs(300, 64, 4)
    gram = x.T @ x
    made, scale, _ = quantize_groups(weight, 4, 64, gram=gram)
    H = gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(64).double()
    inverse, left = torch.linalg.inv(H), weight.double()
    own = widen_groups(made, scale, None, 64).double()
    steps = scale.double().squeeze(-1)
    for column in range(64):
        level = (left[:, column] / steps).round().clamp(-8, 7)
        # In float32 a number between two levels may fall to the other one.
        near = ((left[:, column] / steps) % 1 - 0.5).abs() < 1e-3
        assert bool((((level * steps) - own[:, column]).abs() < 1e-9)[~near].all())
        error = (left[:, column] - own[:, column]) / inverse[column, column]
        left = left - error[:, None] * inverse[column][None]
        inverse = (
            inverse - torch.outer(inverse[:, column], inverse[column]) / (inverse[column, column])
        )


def test_inputs_that_were_never_there_are_no_obstacle() -> None:
    weight, x = torch.randn(8, 64), inputs(5, 64)
    x[:, 10:20] = 0
    assert bool((rounded(weight, x.T @ x, group=32, offset=True) - weight).abs().max() < 1)
    assert bool(rounded(weight, torch.zeros(64, 64), group=32, offset=True).isfinite().all())
    with pytest.raises(InputError, match="not finite"):
        rounded(weight, torch.full((64, 64), torch.inf), group=32)
