from collections.abc import Callable
from typing import Any, Literal, Optional, Union

import pytest

from quintet.errors import InputError
from quintet.tokenization import function_schema


def typed(
    a: str,
    b: int,
    c: list[float],
    d: dict[str, bool],
    e: Literal["x", "y"],
    f: Optional[int] = None,  # noqa: UP045
    g: Union[int, str] = 1,  # noqa: UP007
    h: list[str] | None = None,
    i: Any = None,
    j: list[list[int]] | dict[str, int] = (),  # type: ignore[assignment]
) -> dict[str, int]:
    """Do something.

    Over two paragraphs.

    Args:
        a: the first
        b: the second,
            on two lines: really
        c: c
        d: d
        e: e
        f: f
        g: g
        h: h
        i: i
        j: j

    Returns:
        what came of it
    """
    return {}


def nothing() -> None:
    """Do nothing."""


def test_schemas_are_those_of_transformers() -> None:
    from transformers.utils import get_json_schema

    assert function_schema(typed) == get_json_schema(typed)
    assert function_schema(nothing)["function"]["parameters"] == {
        "type": "object",
        "properties": {},
    }


def bare(a: str) -> None: ...
def untyped(a) -> None:  # type: ignore[no-untyped-def]
    """Do it.

    Args:
        a: a
    """


def undescribed(a: str) -> None:
    """Do it."""


def starred(*a: str) -> None:
    """Do it."""


def odd(a: complex) -> None:
    """Do it.

    Args:
        a: a
    """


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (bare, "no docstring"),
        (untyped, "no type for its parameter 'a'"),
        (undescribed, "does not describe 'a'"),
        (starred, r"takes \*a"),
        (odd, "has the type <class 'complex'>"),
    ],
)
def test_what_a_model_could_not_read_is_refused(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        function_schema(function)
