"""A value either fits its annotation or is refused by a message that names key, value and rule."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from quintet.configuration.constraints import (
    Bounds,
    Count,
    Fraction,
    Labels,
    Layers,
    NonNegative,
    NonNegativeFloat,
    Positive,
    check,
)
from quintet.errors import ConfigError, shown

FITS = [
    pytest.param(1, Count, id="count-least"),
    pytest.param(10**30, Count, id="count-without-limit"),
    pytest.param(0, NonNegative, id="zero"),
    pytest.param(0.0, NonNegativeFloat, id="zero-float"),
    pytest.param(3, float, id="int-for-float"),
    pytest.param(1e-300, Positive, id="tiny"),
    pytest.param(0, Fraction, id="fraction-low"),
    pytest.param(1, Fraction, id="fraction-high"),
    pytest.param(1_000, Layers, id="most-layers"),
    pytest.param(None, Count | None, id="null"),
    pytest.param([1, 2], int | list[int], id="list"),
    pytest.param((1, 2), list[int], id="tuple-for-list"),
    pytest.param([], list[str], id="empty-list"),
    pytest.param({1: "a"}, dict[int, str], id="mapping"),
    pytest.param(math.tanh, str | Callable[[Any], Any], id="function"),
    pytest.param(object(), Any, id="anything"),
    pytest.param(False, bool, id="bool"),
]
MISFITS = [
    pytest.param(0, Count, "an integer at least 1", id="count-zero"),
    pytest.param(-1, NonNegative, "an integer at least 0", id="negative"),
    pytest.param(True, int, "an integer", id="bool-for-int"),
    pytest.param(True, float, "a finite number", id="bool-for-float"),
    pytest.param(1.0, int, "an integer", id="float-for-int"),
    pytest.param("1", int, "an integer", id="text-for-int"),
    pytest.param(1, bool, "true or false", id="int-for-bool"),
    pytest.param(math.nan, float, "a finite number", id="nan"),
    pytest.param(math.inf, float, "a finite number", id="inf"),
    pytest.param(-math.inf, NonNegativeFloat, "a finite number at least 0", id="minus-inf"),
    pytest.param(10**400, float, "a finite number", id="int-longer-than-a-float"),
    pytest.param(0.0, Positive, "a finite number greater than 0", id="open-below"),
    pytest.param(1.01, Fraction, "a finite number at least 0 and at most 1", id="fraction-above"),
    pytest.param(1_001, Layers, "an integer at least 1 and at most 1000", id="layers"),
    pytest.param(10**9, Labels, "an integer at least 1 and at most 1000000", id="labels"),
    pytest.param("x", Count | None, "an integer at least 1 or null", id="neither-option"),
    pytest.param(["a", 1], list[str], "a list of a string", id="one-bad-item"),
    pytest.param("ab", list[str], "a list of a string", id="text-for-list"),
    pytest.param({"a": "b"}, dict[int, str], "a mapping", id="bad-name"),
    pytest.param([], dict[str, Any], "a mapping", id="list-for-mapping"),
    pytest.param(3, str | Callable[[Any], Any], "a string or a function", id="no-function"),
    pytest.param(None, str, "a string", id="null-for-text"),
]


@pytest.mark.parametrize(("value", "annotation"), FITS)
def test_a_fitting_value_passes(value: Any, annotation: Any) -> None:
    check("Owner", "key", value, annotation)


@pytest.mark.parametrize(("value", "annotation", "rule"), MISFITS)
def test_a_misfit_is_named_with_key_value_and_rule(value: Any, annotation: Any, rule: str) -> None:
    with pytest.raises(ConfigError) as error:
        check("Owner", "key", value, annotation)
    assert str(error.value) == f"Owner: key={shown(value)} has to be {rule}"


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        pytest.param(Bounds(1), [1, 9e99], [0.99, math.nan], "at least 1", id="closed"),
        pytest.param(Bounds(0, open_below=True), [1e-9], [0, -1], "greater than 0", id="open"),
        pytest.param(Bounds(2, 3), [2, 3], [1, 4], "at least 2 and at most 3", id="both"),
    ],
)
def test_bounds(bounds: Bounds, inside: list[float], outside: list[float], words: str) -> None:
    assert all(bounds.holds(value) for value in inside)
    assert not any(bounds.holds(value) for value in outside)
    assert str(bounds) == words
